// What all kernels include one way or another, compiled once: half of the time of a small one. The
// names of CUDA (ptx/builtins.h) are not among it: the standard library has some of them too.
#pragma once

#ifdef SIMT_REDIRECT
#include "harness/redirect.h"  // before all others
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "harness/simt.h"
