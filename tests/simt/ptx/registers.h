// Host twin of csrc/ptx/registers.h.
#pragma once

#include "ptx/builtins.h"

namespace fused_lm::ptx {

template <int kCount>
void registers_decrease(SIMT_HERE) {
  ::simt::set_registers(kCount, false, here);
}
template <int kCount>
void registers_increase(SIMT_HERE) {
  ::simt::set_registers(kCount, true, here);
}

}  // namespace fused_lm::ptx
