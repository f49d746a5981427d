// The harness' face to Python: how to run, what was counted, and torch's CPU memory as device
// memory between red zones.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "common/device.h"
#include "common/matrix_descriptor.h"
#include "harness/operands.h"
#include "kernels/attention_bwd_hopper.h"
#include "kernels/attention_decode_tuning.h"
#include "kernels/attention_tuning.h"
#include "kernels/attention_tuning_sm90.h"
#include "kernels/cross_entropy_tuning.h"
#include "kernels/gemm_tuning_sm90.h"
#include "kernels/layernorm_tuning.h"
#include "planted/planted.h"

namespace py = pybind11;

namespace {

thread_local int scopes_on_device = 0;  // autograd runs operators on threads of its own

c10::Allocator* ordinary;  // torch's own, or that of another build of the harness

// Stands before the ordinary allocator; memory of either is freed by whoever made it.
class DeviceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* p = scopes_on_device > 0 ? simt::device_malloc(bytes) : ordinary->raw_allocate(bytes);
    return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
  }
  // oneDNN allocates without a DataPtr, at any time.
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void release(void* p) {
    simt::is_device_memory(p) ? simt::device_free(p) : ordinary->raw_deallocate(p);
  }
};

void install_allocator() {
  static DeviceAllocator allocator;
  ordinary = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&allocator, 1);
}

const char* interned(const std::string& text) {
  static std::map<std::string, int> kept;
  return kept.emplace(text, 0).first->first.c_str();
}

template <class Choice>
Choice choice(const std::string& name, const std::map<std::string, Choice>& choices) {
  const auto found = choices.find(name);
  if (found == choices.end()) throw py::value_error("unknown choice: " + name);
  return found->second;
}

void configure(const std::string& order, const std::string& timing, uint64_t seed,
               bool count_transactions, uint64_t most_accesses, uint32_t max_smem_bytes,
               bool hopper, int multiprocessors, const std::string& dropped_file,
               int dropped_line) {
  simt::Config fresh;
  fresh.order = choice<simt::Order>(order, {{"round_robin", simt::Order::kRoundRobin},
                                            {"reverse", simt::Order::kReverse},
                                            {"first", simt::Order::kFirst},
                                            {"random", simt::Order::kRandom}});
  fresh.timing = choice<simt::Timing>(timing, {{"eager", simt::Timing::kEager},
                                               {"lazy", simt::Timing::kLazy},
                                               {"random", simt::Timing::kRandom}});
  fresh.seed = seed;
  fresh.count_transactions = count_transactions;
  fresh.most_accesses = most_accesses;
  fresh.max_smem_bytes = max_smem_bytes;
  fresh.hopper = hopper;
  fresh.multiprocessors = multiprocessors;
  if (dropped_line > 0) fresh.dropped = {interned(dropped_file), dropped_line};
  simt::config = fresh;
}

std::map<std::string, uint64_t> counters() {
  const simt::Counters& c = simt::counters;
  return {{"launches", c.launches},
          {"blocks", c.blocks},
          {"switches", c.switches},
          {"global_read_bytes", c.global_read_bytes},
          {"global_write_bytes", c.global_write_bytes},
          {"global_sectors", c.global_sectors},
          {"global_ideal_sectors", c.global_ideal_sectors},
          {"shared_wavefronts", c.shared_wavefronts},
          {"shared_ideal_wavefronts", c.shared_ideal_wavefronts},
          {"mma_flops", c.mma_flops},
          {"bulk_bytes", c.bulk_bytes},
          {"wgmma_flops", c.wgmma_flops},
          {"wgmma_shared_bytes", c.wgmma_shared_bytes}};
}

std::vector<std::tuple<std::string, int, std::string>> sites() {
  std::vector<std::tuple<std::string, int, std::string>> found;
  for (const simt::Site& site : simt::sites()) found.emplace_back(site.file, site.line, site.kind);
  return found;
}

// What the formulas of bytes moved in csrc/kernels/layernorm_*.cu depend on.
py::dict norm_tuning(int64_t C, int vector_width, bool forward) {
  const fused_lm::NormTuning tuning = forward ? fused_lm::norm_forward_tuning(C, vector_width)
                                              : fused_lm::norm_backward_tuning(C, vector_width);
  using namespace py::literals;
  return py::dict("looped"_a = tuning.shape == fused_lm::NormShape::kLooped,
                  "threads_per_row"_a = tuning.threads_per_row, "groups"_a = tuning.groups,
                  "rows_per_block"_a = tuning.rows_per_block(),
                  "blocks_per_sm"_a = tuning.blocks_per_sm, "reason"_a = tuning.reason);
}

// Likewise of csrc/kernels/attention_fwd_*.h; head_dim is one that kernels are compiled for,
// team_warps those of a block of teams, or 0.
py::dict attention_tuning(int head_dim, bool general, int team_warps) {
  const fused_lm::AttentionTuning tuning =
      team_warps > 0 ? fused_lm::attention_forward_teams_tuning(head_dim, general, team_warps)
      : general      ? fused_lm::attention_forward_general_tuning(head_dim)
                     : fused_lm::attention_forward_plain_tuning(head_dim);
  using namespace py::literals;
  return py::dict("block_t"_a = tuning.block_t(), "block_s"_a = tuning.block_s,
                  "threads"_a = tuning.threads(), "rows_per_warp"_a = tuning.rows_per_warp,
                  "blocks_per_sm"_a = tuning.blocks_per_sm, "reason"_a = tuning.reason);
}

// Of csrc/kernels/attention_fwd_sm90.h.
py::dict attention_tuning_sm90(int head_dim, bool general) {
  const fused_lm::HopperTuning tuning = fused_lm::attention_forward_tuning_sm90(head_dim, general);
  using namespace py::literals;
  return py::dict("block_t"_a = tuning.block_t(), "block_s"_a = tuning.block_s,
                  "stages"_a = tuning.stages, "reason"_a = tuning.reason);
}

// Of csrc/kernels/attention_bwd_sm90.h.
py::dict attention_bwd_tuning_sm90(int head_dim, bool general, int queries) {
  const bool is_long = !general && fused_lm::hopper_backward_takes_long(head_dim, queries);
  const fused_lm::HopperBackwardTuning tuning =
      fused_lm::attention_backward_tuning_sm90(head_dim, general, is_long);
  using namespace py::literals;
  return py::dict(
      "block_t"_a = tuning.block_t, "block_s"_a = fused_lm::hopper_backward_keys(head_dim),
      "bulk_adds"_a = tuning.adds == fused_lm::GradientAdds::kBulk, "reason"_a = tuning.reason);
}

// Of csrc/kernels/attention_bwd_order_sm90.h: slots, and the model's clocks with them and in any
// order.
py::dict attention_bwd_slots_sm90(const std::array<int, 7>& shape, int multiprocessors) {
  const auto [B, H, group, T, S, D, Dv] = shape;
  const fused_lm::HopperBackwardWork work =
      fused_lm::hopper_backward_work({B, H, group, T, S, D, Dv});
  const int slots = fused_lm::hopper_backward_slots(work, multiprocessors);
  using namespace py::literals;
  return py::dict(
      "slots"_a = slots,
      "clocks"_a =
          slots == 0 ? 0.0 : fused_lm::hopper_backward_clocks(work, slots, slots, multiprocessors),
      "in_any_order"_a = fused_lm::hopper_backward_clocks_in_any_order(work, multiprocessors),
      "bytes"_a = slots * work.slot_bytes);
}

// Of csrc/kernels/gemm_sm90.h and gemm_parts_sm90.h.
py::dict gemm_plan_sm90(int M, int N, int K, const std::string& work, int multiprocessors) {
  using Work = fused_lm::GemmWork;
  const std::map<std::string, Work> works = {
      {"linear", Work::kLinear},     {"activation", Work::kActivation},
      {"gradient", Work::kGradient}, {"backward", Work::kBackward},
      {"gated", Work::kGated},       {"gated backward", Work::kGatedBackward},
      {"residual", Work::kResidual},
  };
  const fused_lm::GemmPlan plan =
      fused_lm::gemm_plan_sm90(M, N, K, works.at(work), multiprocessors);
  using namespace pybind11::literals;
  return py::dict("block_n"_a = plan.tuning.block_n, "ping_pong"_a = plan.tuning.ping_pong,
                  "stages"_a = plan.tuning.stages, "cluster"_a = plan.tuning.cluster,
                  "reason"_a = plan.tuning.reason, "whole"_a = plan.whole, "blocks"_a = plan.blocks,
                  "slots"_a = plan.slots);
}

py::dict backward_tuning(const fused_lm::AttentionBackwardTuning& tuning) {
  using namespace py::literals;
  return py::dict("block_own"_a = tuning.block_own(), "block_other"_a = tuning.block_other,
                  "threads"_a = tuning.threads(), "team"_a = tuning.team,
                  "reason"_a = tuning.reason);
}

// Of its backward: the pass over keys without teams.
py::dict attention_dkdv_tuning(int head_dim, bool general) {
  return backward_tuning(fused_lm::attention_dkdv_tuning(head_dim, general));
}

// In blocks of so many warps, of teams; makes "dk", "dv", "dq", or "dkdv".
py::dict attention_backward_teams_tuning(int head_dim, const std::string& makes, int warps) {
  using fused_lm::TeamPass;
  const auto pass = choice<TeamPass>(makes, {{"dk", TeamPass::kKeys},
                                             {"dv", TeamPass::kValues},
                                             {"dq", TeamPass::kQueries},
                                             {"dkdv", TeamPass::kBoth}});
  return backward_tuning(fused_lm::attention_backward_teams_tuning(head_dim, pass, warps));
}

// Of csrc/kernels/attention_decode_sm80.h.
py::dict attention_decode_tuning(int head_dim) {
  const fused_lm::DecodeTuning tuning = fused_lm::attention_decode_tuning(head_dim);
  using namespace py::literals;
  return py::dict("warps"_a = tuning.warps, "threads"_a = tuning.threads(),
                  "block_s"_a = tuning.block_s, "reason"_a = tuning.reason);
}

// Of csrc/kernels/cross_entropy_rows.cu.
py::dict cross_entropy_tuning(int64_t V, int element_bytes, size_t shared_bytes) {
  const auto tuning = fused_lm::cross_entropy_tuning(V, element_bytes, shared_bytes);
  using namespace py::literals;
  return py::dict("threads"_a = tuning.threads, "kept_vectors"_a = tuning.kept_vectors,
                  "shared_bytes"_a = tuning.shared_bytes(), "reason"_a = tuning.reason);
}

// On the harness' GPU.
int attention_decode_splits(int B, int H, int group, int T, int S, int D, int Dv) {
  return fused_lm::attention_decode_splits({B, H, group, T, S, D, Dv},
                                           fused_lm::multiprocessors(0));
}

py::dict attention_dq_tuning(int head_dim, bool general) {
  return backward_tuning(fused_lm::attention_dq_tuning(head_dim, general));
}

}  // namespace

PYBIND11_MODULE(SIMT_LIBRARY, m) {
  install_allocator();
  m.attr("RACE_BUILD") = simt::kRaceBuild;
  m.def("configure", &configure, py::arg("order"), py::arg("timing"), py::arg("seed"),
        py::arg("count_transactions"), py::arg("most_accesses"), py::arg("max_smem_bytes"),
        py::arg("hopper"), py::arg("multiprocessors"), py::arg("dropped_file"),
        py::arg("dropped_line"));
  m.def("counters", &counters);
  m.def("reset_counters", [] { simt::counters = {}; });
  m.def("sites", &sites);
  m.def("forget_sites", &simt::forget_sites);
  m.def("kernels_run", &simt::kernels_run);
  m.def("allocate_on_device", [](bool on) { scopes_on_device += on ? 1 : -1; });
  m.def("is_device_memory",
        [](uintptr_t p) { return simt::is_device_memory(reinterpret_cast<const void*>(p)); });
  m.def("attention_tuning", &attention_tuning, py::arg("head_dim"), py::arg("general"),
        py::arg("team_warps"));
  m.def("attention_tuning_sm90", &attention_tuning_sm90, py::arg("head_dim"), py::arg("general"));
  m.attr("HOPPER_HEAD_DIMS") =
      std::vector<int>(std::begin(fused_lm::kHopperHeadDims), std::end(fused_lm::kHopperHeadDims));
  m.def("gemm_plan_sm90", &gemm_plan_sm90, py::arg("M"), py::arg("N"), py::arg("K"),
        py::arg("work"), py::arg("multiprocessors") = simt::Config{}.multiprocessors);
  m.def("attention_bwd_tuning_sm90", &attention_bwd_tuning_sm90, py::arg("head_dim"),
        py::arg("general"), py::arg("queries_without_band") = 0);
  m.def("attention_bwd_slots_sm90", &attention_bwd_slots_sm90, py::arg("shape"),
        py::arg("multiprocessors"));
  m.attr("HOPPER_BACKWARD_HEAD_DIMS") = std::vector<int>(
      std::begin(fused_lm::kHopperBackwardHeadDims), std::end(fused_lm::kHopperBackwardHeadDims));
  m.def("attention_dkdv_tuning", &attention_dkdv_tuning, py::arg("head_dim"), py::arg("general"));
  m.def("attention_backward_teams_tuning", &attention_backward_teams_tuning, py::arg("head_dim"),
        py::arg("makes"), py::arg("warps"));
  m.def("attention_dq_tuning", &attention_dq_tuning, py::arg("head_dim"), py::arg("general"));
  m.def("attention_decode_tuning", &attention_decode_tuning, py::arg("head_dim"));
  m.def("attention_decode_splits", &attention_decode_splits);
  m.def("cross_entropy_tuning", &cross_entropy_tuning);
  m.attr("MAX_JOINT_HEAD_DIM") = fused_lm::kMaxJointHeadDim;
  m.attr("HEAD_DIMS") =
      std::vector<int>(std::begin(fused_lm::kHeadDims), std::end(fused_lm::kHeadDims));
  m.def("norm_tuning", &norm_tuning);
  m.def(
      "operand_address",
      [](uint32_t leading_bytes, uint32_t stride_bytes, int swizzle, uint32_t advance, uint32_t mn,
         uint32_t k, bool turned) {
        const uint64_t descriptor = fused_lm::matrix_descriptor(
            simt::kSharedBase, leading_bytes, stride_bytes, fused_lm::Swizzle{swizzle});
        const uint64_t at = fused_lm::advanced(descriptor, advance);
        return simt::element_address(at, mn, k, turned) - simt::kSharedBase;
      },
      py::arg("leading_bytes"), py::arg("stride_bytes"), py::arg("swizzle"), py::arg("advance"),
      py::arg("mn"), py::arg("k"), py::arg("turned"));
  m.def("planted_kernels", &planted::names);
  m.def("run_planted", &planted::run);
}
