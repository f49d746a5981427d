// Tensor maps: what the driver accepts, and which elements a box has.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>

#include "harness/async.h"

namespace simt {
namespace {

constexpr int kMaxBox = 256;
constexpr int64_t kMaxSize = int64_t{1} << 32, kMaxStride = int64_t{1} << 40;

template <class T>
void add_as(char* to, const char* from, int count) {
  for (int i = 0; i < count; ++i) {
    T a, b;
    memcpy(&a, to + i * sizeof(T), sizeof(T));
    memcpy(&b, from + i * sizeof(T), sizeof(T));
    const T sum = static_cast<T>(static_cast<float>(a) + static_cast<float>(b));
    memcpy(to + i * sizeof(T), &sum, sizeof(T));
  }
}

}  // namespace

uint32_t bytes_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

uint32_t row_bytes(const TensorMap& map) { return map.box[0] * bytes_of(map.element); }

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = row_bytes(map);
  for (int dim = 1; dim < map.rank; ++dim) bytes *= map.box[dim];
  return bytes;
}

// CUDA driver API 6.29, cuTensorMapEncodeTiled. Narrower than there: a swizzled row fills its span.
const char* problem_of(const TensorMap& map) {
  if (map.rank < 1 || map.rank > kMaxRank) return "a tensor map has 1 to 5 dimensions";
  if (reinterpret_cast<uintptr_t>(map.base) % 16) return "its base is not 16-byte aligned";
  for (int dim = 0; dim < map.rank; ++dim) {
    if (map.sizes[dim] < 1 || map.sizes[dim] > kMaxSize) return "a dimension is 0 or above 2^32";
    if (map.box[dim] < 1 || map.box[dim] > kMaxBox) return "a box has 1 to 256 elements each way";
    if (dim == 0) continue;
    if (map.strides[dim] % 16) return "a stride is no multiple of 16 bytes";
    if (map.strides[dim] <= 0 || map.strides[dim] >= kMaxStride) return "a stride is out of range";
  }
  if (row_bytes(map) % 16) return "a row of the box is no multiple of 16 bytes";
  if (map.swizzle != 0 && row_bytes(map) != static_cast<uint32_t>(map.swizzle)) {
    return "a row of the box is not what the swizzle spans";
  }
  return nullptr;
}

std::vector<BoxRow> rows_of(const TensorMap& map, const std::array<int, kMaxRank>& at) {
  std::vector<BoxRow> rows(box_bytes(map) / row_bytes(map));
  const int64_t first = std::clamp<int64_t>(-int64_t{at[0]}, 0, map.box[0]);
  const int64_t end = std::clamp<int64_t>(map.sizes[0] - at[0], first, map.box[0]);
  for (size_t i = 0; i < rows.size(); ++i) {
    bool inside = true;
    char* global = map.base + (at[0] + first) * bytes_of(map.element);
    size_t rest = i;
    for (int dim = 1; dim < map.rank; ++dim) {
      const int64_t index = at[dim] + static_cast<int64_t>(rest % map.box[dim]);
      rest /= map.box[dim];
      inside &= index >= 0 && index < map.sizes[dim];
      global += index * map.strides[dim];
    }
    rows[i] = {static_cast<int64_t>(i) * row_bytes(map), global, static_cast<int>(first),
               static_cast<int>(inside ? end : first)};
  }
  return rows;
}

void add_elements(char* to, const char* from, int count, Element element) {
  if (element == Element::kFloat32) add_as<float>(to, from, count);
  if (element == Element::kFloat16) add_as<__half>(to, from, count);
  if (element == Element::kBFloat16) add_as<__nv_bfloat16>(to, from, count);
}

}  // namespace simt
