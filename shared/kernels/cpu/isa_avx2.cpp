#include "library.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define SL_LEVEL 1
#define SL_NS avx2
#include "step.h"

slipstream::Kernels avx2_kernels() { return avx2::kernels(); }
#pragma GCC pop_options
#endif
