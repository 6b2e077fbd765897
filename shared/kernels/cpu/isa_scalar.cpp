#include "library.h"

#define SL_LEVEL 0
#define SL_NS scalar
#include "step.h"

slipstream::Kernels scalar_kernels() { return scalar::kernels(); }
