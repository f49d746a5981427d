// Operands of wgmma in shared memory, as PTX 9.7.15.5 draws them (tests hold them against CuTe's):
// chunks of 16 bytes, eight of them an 8x8 matrix; descriptors say how matrices follow one another.
#include "harness/operands.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

namespace simt {
namespace {

constexpr uint32_t kChunk = 8;

struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  int swizzle;
};

Descriptor decode(uint64_t bits, Location here) {
  static constexpr int kSpans[] = {0, 128, 64, 32};
  if (bits >> 49 & 7) fail("wgmma at %s: a descriptor's base offset", to_string(here).c_str());
  const auto field = [&](int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; };
  return {field(0), field(16), field(32), kSpans[bits >> 62]};
}

// The address of the chunk that holds element (mn, k): eight along k, or along mn where `turned`.
uint32_t chunk_address(const Descriptor& d, uint32_t mn, uint32_t k, bool turned) {
  const uint32_t width = d.swizzle ? d.swizzle / kChunkBytes : 1;  // chunks side by side
  const uint32_t row = width * kChunkBytes;
  uint32_t offset;
  if (!turned) {
    offset = mn % 8 * row + mn / 8 * d.stride + k / 8 * (d.swizzle ? kChunkBytes : d.leading);
  } else if (d.swizzle) {
    const uint32_t chunk = mn / 8;
    offset =
        chunk % width * kChunkBytes + chunk / width * d.leading + k % 8 * row + k / 8 * d.stride;
  } else {
    offset = mn / 8 * d.stride + k % 8 * kChunkBytes + k / 8 * d.leading;
  }
  return swizzled(d.start + offset, d.swizzle);
}

}  // namespace

float to_float(uint16_t bits, Half type) {
  if (type == Half::kFloat16) {
    __half h;
    memcpy(&h, &bits, sizeof bits);
    return __half2float(h);
  }
  const uint32_t wide = uint32_t{bits} << 16;
  float f;
  memcpy(&f, &wide, sizeof f);
  return f;
}

uint32_t element_address(uint64_t descriptor, uint32_t mn, uint32_t k, bool turned) {
  return chunk_address(decode(descriptor, {}), mn, k, turned) + 2 * (turned ? mn % 8 : k % 8);
}

std::vector<Chunk> chunks_of(const Operand& o, Location here) {
  const Descriptor d = decode(o.descriptor, here);
  const uint32_t mn_step = o.turned ? kChunk : 1, k_step = o.turned ? 1 : kChunk;
  std::vector<Chunk> found;
  for (uint32_t mn = 0; mn < o.rows; mn += mn_step) {
    for (uint32_t k = 0; k < kOperandDepth; k += k_step) {
      const uint32_t address = chunk_address(d, o.first + mn, k, o.turned);
      found.push_back({checked_shared_offset(address, kChunkBytes, "wgmma operand", here), mn, k});
    }
  }
  return found;
}

void load_operand(std::vector<float>& values, const Operand& o, Half type, Location here) {
  values.resize(kOperandDepth * o.rows);
  for (const Chunk& at : chunks_of(o, here)) {
    uint16_t chunk[kChunk];
    memcpy(chunk, block().smem + at.offset, sizeof chunk);
    for (uint32_t i = 0; i < kChunk; ++i) {
      const uint32_t index = o.turned ? at.k * o.rows + at.mn + i : (at.k + i) * o.rows + at.mn;
      values[index] = to_float(chunk[i], type);
    }
  }
}

}  // namespace simt
