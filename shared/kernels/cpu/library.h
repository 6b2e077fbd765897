// Everything of the standard library that the kernels use, to be included before an instruction set is chosen: inline
// functions of these headers must not be compiled with instructions that another processor lacks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cores.h"
#include "slipstream_cpu.h"
#include "team.h"
