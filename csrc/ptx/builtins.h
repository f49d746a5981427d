// What CUDA itself gives a kernel: thread indices, warp collectives, vector and half types. The
// host twin (tests/simt/ptx/builtins.h) gives the same names to g++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
