// The products of codes of 8 bits that CUTLASS computes: TMA brings tiles of both operands to shared memory,
// two groups of warps multiply them there (wgmma), sums stay in 32 bits of integer, and the epilogue scales
// them by their column and row, and adds what is there already. The one file that includes CUTLASS, compiled
// for sm_90a only; a kernel more would take the compiler half a minute more.
#include <cstdlib>
#include <string>
#include <string_view>
#include <type_traits>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/version.h>

#include "kernels/cuda/codes_gemm.h"

namespace fathom::cuda {

namespace {

using namespace cute;  // its static integers and strides

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int kCodeAlignment = 16;  // codes of one TMA line
constexpr int kOutAlignment = 8;    // of bf16
constexpr const char* kOp = "linear_codes_forward";

/// A sum times its scale as the other kernels compute it, which begin with zero and add: no sum is -0.
template <typename Fragment>
struct ScaledSum {
  CUTLASS_DEVICE Fragment operator()(const Fragment& sums, const Fragment& scales) const {
    Fragment scaled;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; ++i) scaled[i] = fmaf(sums[i], scales[i], 0.0F);
    return scaled;
  }
};

/// How a product is cut up. Tile: rows, outs and columns of a step; Cluster: blocks that share what they
/// read.
struct Large {
  using Tile = Shape<_128, _256, _128>;
  using Cluster = Shape<_2, _1, _1>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;  // two groups of warps, one tile
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
struct Small {
  using Tile = Shape<_64, _128, _128>;
  using Cluster = Shape<_1, _1, _1>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;  // a tile for each group
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

template <typename Cut, bool kOntoBase>
struct Product {
  using Tile = typename Cut::Tile;
  using OfColumn =
      cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, _1, std::int64_t>>;
  using OfRow =
      cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<_1, _0, std::int64_t>>;
  using ScaleByColumn = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<ScaledSum, float, float, kRound>,
      cutlass::epilogue::fusion::Sm90AccFetch, OfColumn>;
  using Scale = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, cutlass::bfloat16_t, float, kRound>,
      ScaleByColumn, OfRow>;
  using AddToBase = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, cutlass::bfloat16_t, float, kRound>, Scale,
      cutlass::epilogue::fusion::Sm90SrcFetch<cutlass::bfloat16_t>>;
  using Result = std::conditional_t<kOntoBase, AddToBase, Scale>;
  using Base = std::conditional_t<kOntoBase, cutlass::bfloat16_t, void>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, typename Cut::Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, std::int32_t, float, Base, RowMajor, kOutAlignment,
      cutlass::bfloat16_t, RowMajor, kOutAlignment, typename Cut::Epilogue, Result>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, std::int8_t, RowMajor, kCodeAlignment, std::int8_t,
      ColumnMajor, kCodeAlignment, std::int32_t, Tile, typename Cut::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Cut::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

template <typename Cut>
std::int64_t tiles(const CodesGemm& g) {
  const std::int64_t of_rows = size<0>(typename Cut::Tile{}), of_outs = size<1>(typename Cut::Tile{});
  return g.batch * ((g.rows + of_rows - 1) / of_rows) * ((g.out + of_outs - 1) / of_outs);
}

/// Large tiles read less and are the faster where there are enough of them. A multiprocessor does three small
/// ones, of a quarter of the work, in the time of a large one.
bool is_large(const CodesGemm& g, int multiprocessors) {
  const auto turns = [&](std::int64_t n) { return (n + multiprocessors - 1) / multiprocessors; };
  return 3 * turns(tiles<Large>(g)) <= turns(tiles<Small>(g));
}

bool on_hopper() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), kOp);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), kOp);
  return major == 9 && minor == 0;
}

void check_status(cutlass::Status status) {
  if (status == cutlass::Status::kSuccess) return;
  check_launch(kOp);
  fail_library(std::string("[linear_codes_forward] CUTLASS: ") + cutlass::cutlassGetStatusString(status));
}

template <typename Cut, bool kOntoBase>
void run(const CodesGemm& g, int multiprocessors, cudaStream_t stream) {
  using Gemm = typename Product<Cut, kOntoBase>::Gemm;
  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {static_cast<int>(g.rows), static_cast<int>(g.out), static_cast<int>(g.row_bytes),
                             static_cast<int>(g.batch)};
  arguments.mainloop = {reinterpret_cast<const std::int8_t*>(g.x),
                        {g.row_bytes, _1{}, g.rows * g.row_bytes},
                        reinterpret_cast<const std::int8_t*>(g.w),
                        {g.row_bytes, _1{}, g.out * g.row_bytes}};
  auto& of_result = arguments.epilogue.thread;
  const typename Product<Cut, kOntoBase>::Scale::Arguments scale{
      {{}, {g.w_scales, 0.0F, {_0{}, _1{}, g.out}}, {}}, {g.x_scales, 0.0F, {_1{}, _0{}, g.rows}}, {}};
  if constexpr (kOntoBase) {
    of_result = {scale, {}, {}};
    arguments.epilogue.ptr_C = reinterpret_cast<const cutlass::bfloat16_t*>(g.base);
    arguments.epilogue.dC = {g.out, _1{}, g.rows * g.out};
  } else {
    of_result = scale;
  }
  arguments.epilogue.ptr_D = reinterpret_cast<cutlass::bfloat16_t*>(g.y);
  arguments.epilogue.dD = {g.out, _1{}, g.rows * g.out};
  arguments.hw_info.sm_count = multiprocessors;
  Gemm gemm;
  check_status(gemm.initialize(arguments, nullptr, stream));
  check_status(gemm.run(stream));
}

}  // namespace

// A number of the preprocessor's as text.
#define FATHOM_TEXT_OF(x) #x
#define FATHOM_TEXT(x) FATHOM_TEXT_OF(x)
const char* codes_gemm_version() {
  return FATHOM_TEXT(CUTLASS_MAJOR) "." FATHOM_TEXT(CUTLASS_MINOR) "." FATHOM_TEXT(CUTLASS_PATCH);
}
const char* why_no_codes_gemm() { return ""; }

bool takes_codes_gemm(const CodesGemm& g) {
  static const bool wanted = [] {
    const char* given = std::getenv("FATHOM_CUTLASS");
    return given == nullptr || std::string_view(given) != "0";
  }();
  return wanted && g.out % kOutAlignment == 0 && g.row_bytes % kCodeAlignment == 0 && aligned(g.y) &&
         aligned(g.x) && aligned(g.w) && aligned(g.base) && on_hopper();
}

void codes_gemm(const CodesGemm& g, int multiprocessors, cudaStream_t stream) {
  const bool large = is_large(g, multiprocessors), onto_base = g.base != nullptr;
  const auto by = large       ? onto_base ? run<Large, true> : run<Large, false>
                        : onto_base ? run<Small, true>
                              : run<Small, false>;
  by(g, multiprocessors, stream);
}

}  // namespace fathom::cuda
