// What all planted kernels share: one signature, and a list that they enter themselves into.
//
// A kernel is a template <bool kBug>; with kBug it makes one mistake. A mark says who reports it:
//
//   // BUG(race,asan): regex         on the line that the report must name, or alone before it
//
// A kernel whose name begins with count_ has no mistake in either version: they differ in what the
// counters say. fragments_ kernels show which lane holds which element.
#pragma once

#include "planted/planted.h"
#include "ptx/launch.h"

namespace planted {

// Floats behind gIn, of which gIn[i] = i + 1.
constexpr int kInputs = 1024;

using Kernel = void (*)(const float* gIn, float* gOut);

struct Shape {
  unsigned threads = 64;
  size_t smem_bytes = 0;
  unsigned blocks = 1;
  int outputs = 0;  // floats behind gOut; 0: one per thread
};

struct Case {
  Case(const char* name, Kernel right, Kernel wrong, Shape shape);
};

#define PLANT(kernel, ...) \
  const Case kernel##_case(#kernel, &kernel<false>, &kernel<true>, Shape{__VA_ARGS__})

}  // namespace planted
