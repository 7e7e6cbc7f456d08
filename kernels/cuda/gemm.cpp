#include "kernels/cuda/gemm.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <type_traits>
#include <vector>

#include <fmt/format.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cublaslt_library.h"
#include "kernels/cuda/handles.h"

namespace fathom::cuda {

namespace {

constexpr int kCandidates = 32;

void check_lt(cublasStatus_t status, const GemmShape& s) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fail_library(fmt::format("[linear] cuBLASLt: {}: {} of C [{}, {}] of k = {}, {} in, {} out.",
                           cublaslt().get_status_string(status), s.batch, s.m, s.n, s.k, name_of(s.in),
                           name_of(s.out)));
}

cudaDataType_t type_of(DType t) {
  switch (t) {
    case DType::F32:
      return CUDA_R_32F;
    case DType::BF16:
      return CUDA_R_16BF;
    default:
      fail_dtype("linear", t);
  }
}

// cuBLASLt's descriptors are plain handles with a create and a destroy each.
struct Descriptors {
  cublasLtMatmulDesc_t product = nullptr;
  std::array<cublasLtMatrixLayout_t, 3> layouts{};  // its A (our B), its B (our A), its C

  Descriptors(const GemmShape& s) {
    const CublasLt& lt = cublaslt();
    check_lt(lt.matmul_desc_create(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F), s);
    // Row-major C = A B is column-major C^T = B^T A^T: the operands change places, and what is stored
    // transposed for us is stored straight for cuBLASLt.
    const cublasOperation_t first = s.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t second = s.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    check_lt(lt.matmul_desc_set_attribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first), s);
    check_lt(lt.matmul_desc_set_attribute(product, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second), s);
    layout(0, s.in, s.transpose_b ? s.k : s.n, s.transpose_b ? s.n : s.k, s.b_stride, s);
    layout(1, s.in, s.transpose_a ? s.m : s.k, s.transpose_a ? s.k : s.m, s.a_stride, s);
    layout(2, s.out, s.n, s.m, 0, s);
  }
  ~Descriptors() {
    const CublasLt& lt = cublaslt();
    for (cublasLtMatrixLayout_t l : layouts) {
      if (l != nullptr) lt.matrix_layout_destroy(l);
    }
    if (product != nullptr) lt.matmul_desc_destroy(product);
  }
  Descriptors(const Descriptors&) = delete;
  Descriptors& operator=(const Descriptors&) = delete;

 private:
  void layout(std::size_t i, DType t, std::int64_t rows, std::int64_t columns, std::int64_t stride,
              const GemmShape& s) {
    const std::int64_t apart_columns = stride > 0 ? stride : rows;
    check_lt(cublaslt().matrix_layout_create(&layouts[i], type_of(t), static_cast<std::uint64_t>(rows),
                                             static_cast<std::uint64_t>(columns), apart_columns),
             s);
    if (s.batch == 1) return;
    const auto count = static_cast<std::int32_t>(s.batch);
    const std::int64_t apart = apart_columns * columns;  // elements
    const auto set = [&](cublasLtMatrixLayoutAttribute_t attribute, const auto& value) {
      check_lt(cublaslt().matrix_layout_set_attribute(layouts[i], attribute, &value, sizeof value), s);
    };
    set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, count);
    set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, apart);
  }
};

/// The largest power of two, up to 256, that divides the number.
std::uint32_t alignment_of(std::uintptr_t address) {
  return address == 0 ? 256U : static_cast<std::uint32_t>(std::min<std::uintptr_t>(256, address & -address));
}

/// That of a batch of matrices of `elements` each, of the type `t`: of the first and of all that follow.
std::uint32_t alignment_of(const void* data, std::int64_t elements, DType t, const GemmShape& s) {
  const std::uint32_t first = alignment_of(reinterpret_cast<std::uintptr_t>(data));
  if (s.batch == 1) return first;
  return std::min(first, alignment_of(static_cast<std::uintptr_t>(elements) * size_of(t)));
}

/// Of A, B and C.
std::array<std::uint32_t, 3> alignments_of(const void* a, const void* b, const void* c, const GemmShape& s) {
  const std::int64_t rows_of_a = s.transpose_a ? s.k : s.m, rows_of_b = s.transpose_b ? s.n : s.k;
  return {alignment_of(a, s.a_stride > 0 ? rows_of_a * s.a_stride : s.m * s.k, s.in, s),
          alignment_of(b, s.b_stride > 0 ? rows_of_b * s.b_stride : s.k * s.n, s.in, s),
          alignment_of(c, s.m * s.n, s.out, s)};
}

// A file of lines "<shape> <algorithm in hexadecimal>", for one device and one version of cuBLASLt. It saves
// time and nothing else: what cannot be read or written is passed over.
class ChoicesOnDisk {
 public:
  explicit ChoicesOnDisk(const std::string& device_name) {
    const auto variable = [](const char* name) {
      const char* value = std::getenv(name);
      return std::filesystem::path(value != nullptr ? value : "");
    };
    const std::filesystem::path xdg = variable("XDG_CACHE_HOME"), home = variable("HOME");
    if (xdg.empty() && home.empty()) return;
    const std::filesystem::path folder = (xdg.empty() ? home / ".cache" : xdg) / "fathom";
    std::error_code error;
    std::filesystem::create_directories(folder, error);
    std::string device = device_name;
    std::replace_if(
        device.begin(), device.end(),
        [](char ch) { return std::isalnum(static_cast<unsigned char>(ch)) == 0; }, '-');
    path_ = folder / fmt::format("gemm-{}-cublaslt-{}.txt", device, cublaslt().get_version());
    std::ifstream in(path_);
    for (std::string line; std::getline(in, line);) {
      const auto space = line.rfind(' ');
      if (space != std::string::npos) known_[line.substr(0, space)] = line.substr(space + 1);
    }
  }

  bool find(const std::string& shape, cublasLtMatmulAlgo_t& algorithm) const {
    const auto found = known_.find(shape);
    if (found == known_.end() || found->second.size() != 2 * sizeof algorithm) return false;
    auto* bytes = reinterpret_cast<unsigned char*>(&algorithm);
    for (std::size_t i = 0; i < sizeof algorithm; ++i) {
      char* end = nullptr;
      const std::string digits = found->second.substr(2 * i, 2);
      bytes[i] = static_cast<unsigned char>(std::strtoul(digits.c_str(), &end, 16));
      if (end != digits.c_str() + 2) return false;
    }
    return true;
  }

  void keep(const std::string& shape, const cublasLtMatmulAlgo_t& algorithm) {
    if (path_.empty()) return;
    std::string line = shape + " ";
    const auto* bytes = reinterpret_cast<const unsigned char*>(&algorithm);
    for (std::size_t i = 0; i < sizeof algorithm; ++i) line += fmt::format("{:02x}", bytes[i]);
    std::ofstream(path_, std::ios::app) << line + "\n";
  }

 private:
  std::filesystem::path path_;
  std::map<std::string, std::string> known_;
};

}  // namespace

struct Gemm::Plan {
  explicit Plan(const GemmShape& s) : descriptors(s) {}
  Descriptors descriptors;
  cublasLtMatmulAlgo_t algorithm{};
};

struct Gemm::State {
  State(cudaStream_t s, const std::string& device_name, bool d)
      : stream(s),
        deterministic(d),
        disk(device_name),
        workspace(make_device_memory("linear", kWorkspaceBytes)) {
    if (clear_outputs) clear(workspace.get(), kWorkspaceBytes);
    check_lt(cublaslt().create(&handle), {});
  }
  ~State() {
    if (handle != nullptr) cublaslt().destroy(handle);
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  cudaStream_t stream;
  bool deterministic;
  cublasLtHandle_t handle = nullptr;
  ChoicesOnDisk disk;
  DeviceMemory workspace;
  // compute-sanitizer's initcheck does not see what cuBLASLt writes with Hopper's bulk copies, and takes its
  // outputs for never written (docs/cuda.md). With this variable they are cleared first.
  bool clear_outputs = std::getenv("FATHOM_INITCHECK") != nullptr;

  void clear(void* data, std::size_t bytes) const {
    check(cudaMemsetAsync(data, 0, bytes, stream), "linear");
  }

  void launch(const Descriptors& d, const cublasLtMatmulAlgo_t& algorithm, void* c, const void* a,
              const void* b, const GemmShape& s, const void* base) const {
    const float one = 1.0F, kept = s.accumulate || s.add_base ? 1.0F : 0.0F;
    check_lt(cublaslt().matmul(handle, d.product, &one, b, d.layouts[0], a, d.layouts[1], &kept,
                               s.add_base ? base : c, d.layouts[2], c, d.layouts[2], &algorithm,
                               workspace.get(), kWorkspaceBytes, stream),
             s);
  }

  // `aligned`: bytes that the addresses of all operands are multiples of.
  std::vector<cublasLtMatmulHeuristicResult_t> candidates(const Descriptors& d, std::uint32_t aligned,
                                                          const GemmShape& s) const {
    const CublasLt& lt = cublaslt();
    cublasLtMatmulPreference_t preference = nullptr;
    check_lt(lt.matmul_preference_create(&preference), s);
    const auto destroy = [&lt](cublasLtMatmulPreference_t p) { lt.matmul_preference_destroy(p); };
    const std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>, decltype(destroy)> owned(
        preference, destroy);
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      check_lt(lt.matmul_preference_set_attribute(preference, attribute, &value, sizeof value), s);
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, aligned);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, aligned);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, aligned);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, aligned);
    // Partial products that meet in memory in the order they come are not reproducible.
    const std::uint32_t ordered =
        CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
    if (deterministic) set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, ordered);
    std::vector<cublasLtMatmulHeuristicResult_t> found(kCandidates);
    int count = 0;
    const cublasStatus_t status =
        lt.matmul_algo_get_heuristic(handle, d.product, d.layouts[0], d.layouts[1], d.layouts[2],
                                     d.layouts[2], preference, kCandidates, found.data(), &count);
    check_lt(status, s);
    found.resize(static_cast<std::size_t>(count));
    // Each result has a verdict of its own; where it is bad, the algorithm is not set.
    std::erase_if(found, [](const auto& result) { return result.state != CUBLAS_STATUS_SUCCESS; });
    if (found.empty()) check_lt(CUBLAS_STATUS_NOT_SUPPORTED, s);
    return found;
  }

  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status), "linear");
    return status != cudaStreamCaptureStatusNone;
  }

  // Milliseconds of one product; infinite where the algorithm refuses.
  float time(const Descriptors& d, const cublasLtMatmulAlgo_t& algorithm, void* c, const void* a,
             const void* b, const GemmShape& s, const void* base) const {
    constexpr int kRepeats = 4;
    const EventHandle begin = make_event("linear"), end = make_event("linear");
    float milliseconds = std::numeric_limits<float>::infinity();
    try {
      launch(d, algorithm, c, a, b, s, base);
      check(cudaEventRecord(begin.get(), stream), "linear");
      for (int i = 0; i < kRepeats; ++i) launch(d, algorithm, c, a, b, s, base);
      check(cudaEventRecord(end.get(), stream), "linear");
      check(cudaEventSynchronize(end.get()), "linear");
      check(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()), "linear");
    } catch (const DeviceError&) {
      throw;
    } catch (const InternalError&) {
      cudaGetLastError();  // refused: another candidate will do
    }
    return milliseconds;
  }

  // The fastest of the candidates, on the operands at hand and an output of its own; none where there is no
  // memory for that, or where every candidate refuses.
  std::optional<cublasLtMatmulAlgo_t> fastest(const Descriptors& d,
                                              const std::vector<cublasLtMatmulHeuristicResult_t>& all,
                                              const void* a, const void* b, const GemmShape& s,
                                              const void* base) const {
    void* data = nullptr;
    const auto bytes = static_cast<std::size_t>(s.batch * s.m * s.n) * size_of(s.out);
    if (cudaMalloc(&data, bytes) != cudaSuccess) {
      cudaGetLastError();  // it is the caller's to go on without
      return std::nullopt;
    }
    const DeviceMemory c(data);
    clear(data, bytes);
    std::optional<cublasLtMatmulAlgo_t> best;
    float least = std::numeric_limits<float>::infinity();
    for (const cublasLtMatmulHeuristicResult_t& candidate : all) {
      const float t = time(d, candidate.algo, data, a, b, s, base);
      if (t < least) least = t, best = candidate.algo;
    }
    check(cudaStreamSynchronize(stream), "linear");
    return best;
  }

  // Shapes of training are round; those of ragged batches come once and are not worth the timing.
  static bool worth_timing(const GemmShape& s) {
    constexpr std::int64_t kRound = 64;
    return s.m % kRound == 0 && s.n % kRound == 0 && s.k % kRound == 0 &&
           s.batch * s.m * s.n * s.k >= (std::int64_t{1} << 27);
  }

  cublasLtMatmulAlgo_t choose(const Descriptors& d, const void* a, const void* b, std::uint32_t aligned,
                              const GemmShape& s, const void* base) {
    const auto all = candidates(d, aligned, s);
    // Timing has noise, and another choice other rounding.
    if (deterministic || !worth_timing(s) || capturing()) return all.front().algo;
    // An algorithm may rely on the addresses that it was chosen for.
    std::string shape = fmt::format("{} {} {} {} {} {} {} {} {}", s.m, s.n, s.k, s.transpose_a ? "t" : "n",
                                    s.transpose_b ? "t" : "n", name_of(s.in), name_of(s.out),
                                    s.accumulate ? "accumulate"
                                    : s.add_base ? "base"
                                                 : "overwrite",
                                    aligned);
    if (s.batch > 1) shape += fmt::format(" batch {}", s.batch);
    if (s.a_stride > 0 || s.b_stride > 0) shape += fmt::format(" strides {} {}", s.a_stride, s.b_stride);
    cublasLtMatmulAlgo_t algorithm{};
    cublasLtMatmulHeuristicResult_t result{};
    if (disk.find(shape, algorithm) &&
        cublaslt().matmul_algo_check(handle, d.product, d.layouts[0], d.layouts[1], d.layouts[2],
                                     d.layouts[2], &algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
        result.workspaceSize <= kWorkspaceBytes) {
      return algorithm;
    }
    const auto best = fastest(d, all, a, b, s, base);
    if (!best) return all.front().algo;
    disk.keep(shape, *best);
    return *best;
  }
};

Gemm::Gemm(cudaStream_t stream, const std::string& device_name, bool deterministic)
    : state_(std::make_unique<State>(stream, device_name, deterministic)) {}

Gemm::~Gemm() = default;

void Gemm::run(void* c, const void* a, const void* b, const GemmShape& s, const void* base) {
  if (s.m == 0 || s.n == 0 || s.batch == 0) return;
  if ((s.k == 0 || state_->clear_outputs) && !s.accumulate) {
    state_->clear(c, static_cast<std::size_t>(s.batch * s.m * s.n) * size_of(s.out));
  }
  if (s.k == 0 && s.add_base) {
    const std::size_t bytes = static_cast<std::size_t>(s.batch * s.m * s.n) * size_of(s.out);
    check(cudaMemcpyAsync(c, base, bytes, cudaMemcpyDeviceToDevice, state_->stream), "linear");
  }
  if (s.k == 0) return;
  // What an algorithm may assume of the addresses belongs to the choice.
  const auto [of_a, of_b, of_c] = alignments_of(a, b, c, s);
  const std::uint32_t of_base = s.add_base ? alignment_of(base, s.m * s.n, s.out, s) : of_c;
  const std::uint32_t aligned = std::min({of_a, of_b, of_c, of_base});
  const auto key = std::tuple_cat(s.key(), std::tuple(aligned));
  auto plan = plans_.find(key);
  if (plan == plans_.end()) {
    auto made = std::make_unique<Plan>(s);
    // Before it is kept: a plan whose choice threw has no algorithm.
    made->algorithm = state_->choose(made->descriptors, a, b, aligned, s, base);
    plan = plans_.emplace(key, std::move(made)).first;
  }
  state_->launch(plan->second->descriptors, plan->second->algorithm, c, a, b, s, base);
}

}  // namespace fathom::cuda
