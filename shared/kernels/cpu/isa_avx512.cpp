#include "library.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#define SL_LEVEL 2
#define SL_NS avx512
#include "step.h"

slipstream::Kernels avx512_kernels() { return avx512::kernels(); }
#pragma GCC pop_options
#endif
