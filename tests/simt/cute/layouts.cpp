// Prints which lane holds which element according to CuTe, one line each:
//
//   <table> <lane> <value> <row> <column>
//
// mma_*: element (row, column) of A [16, 16], B [16, 8] or C [16, 8].
// ldmatrix_*, stmatrix_*: 16-bit element `column` of the row that lane `row` gave the address of.
// Values count 16-bit elements in registers, fp32 in C.
// wgmma_*: likewise of the 128 threads of a warpgroup.
// operand_*: element (mn, k) of an operand in shared memory, its byte, and nothing.
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
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

// A product of a warpgroup: d of 64 columns, and a where it is in registers.
void print_wgmma() {
  namespace gmma = cute::SM90::GMMA;
  using Atom = cute::SM90_64x64x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>;
  using Traits = cute::MMA_Traits<Atom>;
  constexpr int M = 64, kThreads = 128;
  const auto print = [](const char* table, auto layout) {
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int value = 0; value < cute::size<1>(layout); ++value) {
        const int at = layout(thread, value);
        std::printf("%s %d %d %d %d\n", table, thread, value, at % M, at / M);
      }
    }
  };
  print("wgmma_d", typename Traits::CLayout{});
  print("wgmma_a", typename Traits::ALayout{});
}

// An operand [128, 64] in shared memory: the place of every element, in bytes, and under "fields_"
// what CuTe writes into its descriptor.
template <class Element, cute::SM90::GMMA::Major kMajor, class Atom>
void print_operand(const std::string& table, Atom atom) {
  constexpr int kRows = 128, kDepth = 64, kStep = 16;
  alignas(1024) static Element memory[kRows * kDepth];  // what is swizzled are addresses
  const auto layout = cute::tile_to_shape(atom, cute::Shape<cute::Int<kRows>, cute::Int<kDepth>>{});
  auto whole = cute::make_tensor(cute::make_smem_ptr(memory), layout);
  for (int mn = 0; mn < kRows; ++mn) {
    for (int k = 0; k < kDepth; ++k) {
      const auto at = reinterpret_cast<const char*>(&whole(mn, k));
      std::printf("%s %d %d %d 0\n", table.c_str(), mn, k,
                  static_cast<int>(at - reinterpret_cast<const char*>(memory)));
    }
  }
  const auto first = cute::local_tile(whole, cute::Shape<cute::Int<kRows>, cute::Int<kStep>>{},
                                      cute::make_coord(0, 0));
  const auto fields = cute::SM90::GMMA::make_gmma_desc<kMajor>(first).bitfield;
  std::printf("\nfields_%s 0 0 %d %d\n", table.c_str(), fields.leading_byte_offset_ * 16,
              fields.stride_byte_offset_ * 16);
}

void print_operands() {
  namespace gmma = cute::SM90::GMMA;
  using Element = cutlass::bfloat16_t;
  constexpr auto kK = gmma::Major::K, kMn = gmma::Major::MN;
  print_operand<Element, kK>("operand_k_0", gmma::Layout_K_INTER_Atom<Element>{});
  print_operand<Element, kK>("operand_k_32", gmma::Layout_K_SW32_Atom<Element>{});
  print_operand<Element, kK>("operand_k_64", gmma::Layout_K_SW64_Atom<Element>{});
  print_operand<Element, kK>("operand_k_128", gmma::Layout_K_SW128_Atom<Element>{});
  print_operand<Element, kMn>("operand_mn_0", gmma::Layout_MN_INTER_Atom<Element>{});
  print_operand<Element, kMn>("operand_mn_32", gmma::Layout_MN_SW32_Atom<Element>{});
  print_operand<Element, kMn>("operand_mn_64", gmma::Layout_MN_SW64_Atom<Element>{});
  print_operand<Element, kMn>("operand_mn_128", gmma::Layout_MN_SW128_Atom<Element>{});
}

}  // namespace

int main() {
  print_wgmma();
  print_operands();
  print_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("mma_bf16");
  print_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("mma_f16");
  print_load<cute::SM75_U32x4_LDSM_N>("ldmatrix_x4");
  print_load<cute::SM75_U16x8_LDSM_T>("ldmatrix_x4_trans");
  print_load<cute::SM75_U32x2_LDSM_N>("ldmatrix_x2");
  print_load<cute::SM75_U16x4_LDSM_T>("ldmatrix_x2_trans");
  print_store<cute::SM90_U32x4_STSM_N>("stmatrix_x4");
  print_store<cute::SM90_U16x8_STSM_T>("stmatrix_x4_trans");
}
