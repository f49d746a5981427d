// What all planted kernels share: one signature, and a list that they enter themselves into.
//
// A kernel is a template <bool kBug>; with kBug it makes one mistake. A mark says who reports it:
//
//   // BUG(race,asan): regex         on the line that the report must name, or alone before it
//
// A kernel whose name begins with count_ has no mistake in either version: they differ in what the
// counters say. fragments_ kernels show which lane holds which element.
#pragma once

#include <functional>

#include "planted/planted.h"
#include "ptx/cluster.h"
#include "ptx/launch.h"
#include "ptx/tensor_map.h"

namespace planted {

// Floats behind gIn, of which gIn[i] = i + 1.
constexpr int kInputs = 1024;

using Kernel = void (*)(const float* gIn, float* gOut);

// For TMA: both arrays as rows of 32 floats, boxes of 8 rows, swizzled by 128 bytes.
constexpr int kMapColumns = 32, kBoxRows = 8;
struct Maps {
  fused_lm::ptx::TensorMap in, out;
};
using MappedKernel = void (*)(Maps maps, const float* gIn, float* gOut);

struct Shape {
  unsigned threads = 64;
  size_t smem_bytes = 0;
  unsigned blocks = 1;
  int outputs = 0;  // floats behind gOut; 0: one per thread
  unsigned cluster = 1;

  int floats() const { return outputs > 0 ? outputs : static_cast<int>(blocks * threads); }
  fused_lm::LaunchConfig launch() const {
    return {dim3(blocks), dim3(threads), smem_bytes, nullptr};
  }
};

// What a planted kernel needs to run: device memory for kInputs and shape.floats() floats.
struct Entry {
  std::function<fused_lm::Status(bool with_bug, const float* in, float* out)> run;
  Shape shape;
};

inline fused_lm::Status make_map(fused_lm::ptx::TensorMap& map, const float* base, int floats) {
  fused_lm::TensorLayout layout{};
  layout.base = base;
  layout.dtype = fused_lm::DType::kFloat32;
  layout.rank = 2;
  layout.sizes[0] = kMapColumns;
  layout.sizes[1] = floats / kMapColumns;
  layout.strides[1] = kMapColumns * sizeof(float);
  layout.box[0] = kMapColumns;
  layout.box[1] = kBoxRows;
  layout.swizzle = fused_lm::Swizzle::k128;
  return fused_lm::encode_tensor_map(map, layout);
}

template <class Kernel, class... Arguments>
fused_lm::Status start(Kernel kernel, const Shape& shape, const Arguments&... args) {
  if (shape.cluster == 1) return fused_lm::launch(kernel, shape.launch(), args...);
  return fused_lm::launch_clusters(kernel, shape.launch(), shape.cluster, args...);
}

inline Entry entry_of(Kernel right, Kernel wrong, const Shape& shape) {
  const auto run = [=](bool with_bug, const float* in, float* out) {
    return start(with_bug ? wrong : right, shape, in, out);
  };
  return {run, shape};
}

inline Entry entry_of(MappedKernel right, MappedKernel wrong, const Shape& shape) {
  const auto run = [=](bool with_bug, const float* in, float* out) {
    Maps maps;
    fused_lm::Status status = make_map(maps.in, in, kInputs);
    if (status == fused_lm::kOk) status = make_map(maps.out, out, shape.floats());
    if (status != fused_lm::kOk) return status;
    return start(with_bug ? wrong : right, shape, maps, in, out);
  };
  return {run, shape};
}

struct Case {
  Case(const char* name, Entry entry);
};

#define PLANT(kernel, ...) \
  const Case kernel##_case(#kernel, entry_of(&kernel<false>, &kernel<true>, Shape{__VA_ARGS__}))

}  // namespace planted
