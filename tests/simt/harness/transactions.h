// What one instruction of a warp costs: 32-byte sectors of global memory, 128-byte wavefronts of
// shared memory. An instruction is a place in the code and how often its lane has come there since
// the warp last met; predicated lanes that come later than others can be grouped wrongly.
#pragma once

#include "harness/race.h"

namespace simt {

void count_access(Origin origin, uintptr_t address, uint32_t bytes, bool shared);
void count_matrix_rows(const uint32_t* row_addresses, int matrices);
void flush_transactions(int warp);

}  // namespace simt
