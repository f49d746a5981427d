// Prints which lane holds which element according to CuTe, one line each:
//
//   <table> <lane> <value> <row> <column>
//
// mma_*: element (row, column) of A [16, 16], B [16, 8] or C [16, 8].
// ldmatrix_*, stmatrix_*: 16-bit element `column` of the row that lane `row` gave the address of.
// Values count 16-bit elements in registers, fp32 in C.
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/layout.hpp>

#include <cstdio>
#include <map>
#include <string>
#include <utility>

namespace {

constexpr int kLanes = 32, kElementBits = 16;

// A layout of (lane, value) to row + rows * column.
template <class Layout>
void print_matrix(const std::string& table, Layout layout, int rows, bool transposed) {
  const int values = cute::size<1>(layout);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int value = 0; value < values; ++value) {
      const int at = layout(lane, value);
      const int first = at % rows, second = at / rows;
      std::printf("%s %d %d %d %d\n", table.c_str(), lane, value, transposed ? second : first,
                  transposed ? first : second);
    }
  }
}

template <class Atom>
void print_mma(const std::string& name) {
  using Traits = cute::MMA_Traits<Atom>;
  constexpr int M = 16, N = 8;
  print_matrix(name + "_a", typename Traits::ALayout{}, M, false);
  print_matrix(name + "_b", typename Traits::BLayout{}, N, true);  // CuTe's B is [N, K]
  print_matrix(name + "_c", typename Traits::CLayout{}, M, false);
}

// Both sides of a copy number the same bits: `registers` by lane and bit of its registers, `rows`
// by lane and bit of the row that it gave the address of.
template <class Registers, class Rows>
void print_copy(const std::string& table, Registers registers, Rows rows) {
  std::map<int, std::pair<int, int>> in_row;
  const int row_bits = cute::size<1>(rows), register_bits = cute::size<1>(registers);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int bit = 0; bit < row_bits; bit += kElementBits) {
      in_row.emplace(rows(lane, bit), std::pair(lane, bit / kElementBits));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int bit = 0; bit < register_bits; bit += kElementBits) {
      const auto [row, column] = in_row.at(registers(lane, bit));
      std::printf("%s %d %d %d %d\n", table.c_str(), lane, bit / kElementBits, row, column);
    }
  }
}

template <class Atom>
void print_load(const std::string& table) {
  using Traits = cute::Copy_Traits<Atom>;
  print_copy(table, typename Traits::DstLayout{}, typename Traits::SrcLayout{});
}

template <class Atom>
void print_store(const std::string& table) {
  using Traits = cute::Copy_Traits<Atom>;
  print_copy(table, typename Traits::SrcLayout{}, typename Traits::DstLayout{});
}

}  // namespace

int main() {
  print_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("mma_bf16");
  print_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("mma_f16");
  print_load<cute::SM75_U32x4_LDSM_N>("ldmatrix_x4");
  print_load<cute::SM75_U16x8_LDSM_T>("ldmatrix_x4_trans");
  print_load<cute::SM75_U32x2_LDSM_N>("ldmatrix_x2");
  print_load<cute::SM75_U16x4_LDSM_T>("ldmatrix_x2_trans");
  print_store<cute::SM90_U32x4_STSM_N>("stmatrix_x4");
  print_store<cute::SM90_U16x8_STSM_T>("stmatrix_x4_trans");
}
