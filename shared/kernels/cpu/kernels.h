// What api.cpp needs of one instruction set: the step of a model behind plain function pointers.
#pragma once

#include "slipstream_cpu.h"

namespace slipstream {

struct Kernels {
    void* (*create)(const sl_model*, int);
    void (*destroy)(void*);
    int (*run)(void*, const sl_step*);
    int (*guess)(void*, const sl_chains*);
    const float* (*hidden)(void*);
    int (*matmul)(void*, const sl_matrix*, const float*, int, float*);
    void (*draw)(const sl_step*, int32_t);
};

}  // namespace slipstream
