// Host twin of csrc/ptx/registers.h: who has how many is added up.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

template <int kCount>
void registers_decrease(SIMT_HERE) {
  ::simt::set_registers(kCount, here);
}
template <int kCount>
void registers_increase(SIMT_HERE) {
  ::simt::set_registers(kCount, here);
}

}  // namespace fused_lm::ptx
