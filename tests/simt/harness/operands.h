// Operands of wgmma in shared memory, and 16-bit numbers.
#pragma once

#include "harness/state.h"

namespace simt {

constexpr int kOperandDepth = 16;  // what one product sums over
constexpr int kChunkBytes = 16;    // eight neighbours

struct Operand {
  uint64_t descriptor;
  uint32_t first, rows;  // along m or n
  bool turned;           // MN-major
};
// Eight elements along k, or along mn where the operand is turned, from (mn, k) of it on.
struct Chunk {
  uint32_t offset, mn, k;
};
std::vector<Chunk> chunks_of(const Operand& operand, Location here);
// As [k][rows].
void load_operand(std::vector<float>& values, const Operand& operand, Half type, Location here);

// The shared address of one element.
uint32_t element_address(uint64_t descriptor, uint32_t mn, uint32_t k, bool turned);

float to_float(uint16_t bits, Half type);

}  // namespace simt
