// The only file that sees cudnn-frontend. Forward and backward are its composite scaled-dot-product-attention
// graphs: matmul, scale, causal mask, softmax, matmul, which cuDNN fuses into one flash kernel. (Its one-node
// form cannot mask causally before cuDNN 9.21.)
#include "kernels/cuda/cudnn_attention.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <tuple>
#include <unordered_map>

#include <cudnn_frontend.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/shared_library.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // where cudnn-frontend looks for cuDNN's functions; set by load()
}  // namespace cudnn_frontend

namespace fathom::cuda {
namespace {

namespace fe = cudnn_frontend;
using fe::graph::Graph;
using fe::graph::Tensor_attributes;
using Tensor = std::shared_ptr<Tensor_attributes>;

constexpr int kOldestVersion = 91002;  // 9.10.0 and 9.10.1 have known faults in attention

// The tensors' names in cuDNN's eyes.
enum Id : std::int64_t { kQuery = 1, kKey, kValue, kOut, kLse, kDout, kDquery, kDkey, kDvalue };
using Pointers = std::unordered_map<std::int64_t, void*>;

std::string& reason() {
  static std::string text;
  return text;
}

std::string version_text(std::size_t v) {
  return fmt::format("{}.{}.{}", v / 10000, v % 10000 / 100, v % 100);
}

// Where CUDA's own libraries may be: beside cuDNN where that comes in a Python environment's packages.
std::vector<std::string> cuda_folders(void* cudnn) {
  std::vector<std::string> folders = {"/usr/local/cuda/lib64"};
  Dl_info where{};
  if (dladdr(dlsym(cudnn, "cudnnGetVersion"), &where) != 0 && where.dli_fname != nullptr) {
    const std::filesystem::path packages = std::filesystem::path(where.dli_fname).parent_path() / "../..";
    for (const char* package : {"cu13/lib", "cuda_runtime/lib", "cuda_nvrtc/lib"}) {
      folders.push_back(packages / package);
    }
  }
  return folders;
}

// cudnn-frontend asks for CUDA's functions in a shared libcudart, which it opens by name. Opened here first,
// it is found by that name wherever it is. (This program's own runtime is linked statically; both work on the
// device's one primary context.)
bool load_cudart(void* cudnn) {
  const std::string name = fmt::format("libcudart.so.{}", CUDART_VERSION / 1000);
  constexpr const char* kVariable = "CUDNN_FRONTEND_CUDART_LIB_NAME";
  const OpenedLibrary cudart =
      open_library({.name = name, .variable = kVariable, .folders = cuda_folders(cudnn)});
  if (cudart.handle == nullptr) {
    reason() = fmt::format("cuDNN needs {}, which cannot be loaded: {}", name, cudart.why_not);
    return false;
  }
  // Otherwise cudnn-frontend would prefer the library of an older CUDA where a machine has both.
  setenv(kVariable, name.c_str(), 0);
  return true;
}

// cuDNN compiles its attention kernels with NVRTC, which it too opens by name. A failure shows in its
// message.
void load_nvrtc(void* cudnn) {
  open_library({.name = fmt::format("libnvrtc.so.{}", CUDART_VERSION / 1000),
                .variable = "FATHOM_NVRTC",
                .folders = cuda_folders(cudnn)});
}

bool load() {
  if (fe::cudnn_dlhandle != nullptr) return true;
  const OpenedLibrary cudnn = open_library(
      {.name = "libcudnn.so.9", .variable = "FATHOM_CUDNN", .folders = {"/usr/local/cuda/lib64"}});
  if (cudnn.handle == nullptr) {
    reason() = fmt::format(
        "cuDNN cannot be loaded: {}. FATHOM_CUDNN may name libcudnn.so.9 or its folder, such as "
        "site-packages/nvidia/cudnn/lib",
        cudnn.why_not);
    return false;
  }
  if (dlsym(cudnn.handle, "cudnnGetVersion") == nullptr) {
    reason() = "the library that FATHOM_CUDNN names is not cuDNN";
    return false;
  }
  if (!load_cudart(cudnn.handle)) return false;
  load_nvrtc(cudnn.handle);
  fe::cudnn_dlhandle = cudnn.handle;
  return true;
}

// Head-major view of packed rows: [B, heads, T, d], a row of `row` elements a position.
void lay_out(Tensor_attributes& t, Id id, const AttentionShape& s, std::int64_t heads, std::int64_t row) {
  t.set_uid(id)
      .set_dim({s.batch, heads, s.seq, s.head_dim})
      .set_stride({s.seq * row, s.head_dim, row, 1})
      .set_data_type(fe::DataType_t::BFLOAT16);
}

void lay_out_lse(Tensor_attributes& t, const AttentionShape& s) {
  t.set_uid(kLse)
      .set_dim({s.batch, s.heads, s.seq, 1})
      .set_stride({s.heads * s.seq, s.seq, 1, 1})
      .set_data_type(fe::DataType_t::FLOAT);
}

Tensor input(Graph& graph, Id id, const AttentionShape& s, std::int64_t heads, std::int64_t row) {
  Tensor_attributes t;
  lay_out(t, id, s, heads, row);
  return graph.tensor(t);
}

void output(const Tensor& t, Id id, const AttentionShape& s, std::int64_t heads, std::int64_t row) {
  t->set_output(true);
  lay_out(*t, id, s, heads, row);
}

// A row of qkv holds H query heads, G key heads, G value heads; a row of out H heads.
std::int64_t qkv_row(const AttentionShape& s) { return (s.heads + 2 * s.kv_heads) * s.head_dim; }
std::int64_t out_row(const AttentionShape& s) { return s.heads * s.head_dim; }
std::int64_t key_offset(const AttentionShape& s) { return s.heads * s.head_dim; }
std::int64_t value_offset(const AttentionShape& s) { return (s.heads + s.kv_heads) * s.head_dim; }

template <typename Attributes>
Attributes causal(Attributes attributes, const AttentionShape& s) {
  attributes.set_attn_scale(static_cast<float>(s.scale))
      .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
      .set_diagonal_band_right_bound(0);
  return attributes;
}

void add_forward(Graph& graph, const AttentionShape& s) {
  const Tensor q = input(graph, kQuery, s, s.heads, qkv_row(s));
  const Tensor k = input(graph, kKey, s, s.kv_heads, qkv_row(s));
  const Tensor v = input(graph, kValue, s, s.kv_heads, qkv_row(s));
  fe::graph::SDPA_attributes attributes = causal(fe::graph::SDPA_attributes().set_name("attention"), s);
  attributes.set_generate_stats(true).set_implementation(fe::AttentionImplementation_t::COMPOSITE);
  const auto [out, lse] = graph.sdpa(q, k, v, attributes);
  output(out, kOut, s, s.heads, out_row(s));
  lse->set_output(true);
  lay_out_lse(*lse, s);
}

void add_backward(Graph& graph, const AttentionShape& s, bool deterministic) {
  const Tensor q = input(graph, kQuery, s, s.heads, qkv_row(s));
  const Tensor k = input(graph, kKey, s, s.kv_heads, qkv_row(s));
  const Tensor v = input(graph, kValue, s, s.kv_heads, qkv_row(s));
  const Tensor out = input(graph, kOut, s, s.heads, out_row(s));
  const Tensor dout = input(graph, kDout, s, s.heads, out_row(s));
  Tensor_attributes lse;
  lay_out_lse(lse, s);
  fe::graph::SDPA_backward_attributes attributes =
      causal(fe::graph::SDPA_backward_attributes().set_name("attention_backward"), s);
  attributes.set_deterministic_algorithm(deterministic);
  const auto [dq, dk, dv] = graph.sdpa_backward(q, k, v, out, dout, graph.tensor(lse), attributes);
  output(dq, kDquery, s, s.heads, qkv_row(s));
  output(dk, kDkey, s, s.kv_heads, qkv_row(s));
  output(dv, kDvalue, s, s.kv_heads, qkv_row(s));
}

enum class Pass { kForward, kBackward };

// The deterministic backward holds a gradient of the scores, 2 bytes for each query and key of each head.
// Sequences do not depend on each other, so a batch goes through in equal parts that bound this.
AttentionShape backward_part(const AttentionShape& s, bool deterministic) {
  constexpr std::int64_t kBytes = 512 << 20;
  AttentionShape part = s;
  if (deterministic) {
    part.batch = std::clamp<std::int64_t>(kBytes / (2 * s.heads * s.seq * s.seq), 1, s.batch);
    while (s.batch % part.batch != 0) --part.batch;
  }
  return part;
}

}  // namespace

struct CudnnAttention::Impl {
  struct Plan {
    Graph graph;
    std::size_t workspace = 0;
    bool to_be_tuned = false;  // its engines are built, and the first run times them
  };
  using Key = std::tuple<Pass, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, double>;

  Impl() = default;
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    plans.clear();
    if (handle != nullptr) fe::detail::destroy_handle(handle);
  }

  // Runs one of cudnn-frontend's calls, whose failures are codes or exceptions.
  template <typename Call>
  void run(Pass pass, const AttentionShape& s, const char* what, Call&& call) {
    std::string message;
    try {
      fe::error_object result = call();
      if (result.is_good()) return;
      message = result.get_message();
    } catch (const std::exception& e) {
      message = e.what();
    }
    fail_library(fmt::format(
        "[attention] cuDNN {} cannot {} the {} of batch {}, seq {}, heads {}, kv_heads {}, head_dim {}: {}.",
        version_text(version), what, pass == Pass::kForward ? "forward" : "backward", s.batch, s.seq, s.heads,
        s.kv_heads, s.head_dim, message));
  }

  Plan& plan(Pass pass, const AttentionShape& s) {
    const Key key{pass, s.batch, s.seq, s.heads, s.kv_heads, s.head_dim, s.scale};
    const auto found = plans.find(key);
    if (found != plans.end()) return *found->second;
    auto made = std::make_unique<Plan>();
    run(pass, s, "plan", [&]() -> fe::error_object {
      Graph& graph = made->graph;
      graph.set_io_data_type(fe::DataType_t::BFLOAT16)
          .set_intermediate_data_type(fe::DataType_t::FLOAT)
          .set_compute_data_type(fe::DataType_t::FLOAT)
          .set_sm_version(compute_capability);
      if (pass == Pass::kForward) {
        add_forward(graph, s);
      } else {
        add_backward(graph, s, deterministic);
      }
      made->to_be_tuned = !deterministic && worth_tuning(s);
      return build(*made);
    });
    return *plans.emplace(key, std::move(made)).first->second;
  }

  // cuDNN's own choice is not always its fastest engine. Where a step spends milliseconds, all are built and
  // timed.
  static bool worth_tuning(const AttentionShape& s) {
    return s.batch * s.heads * s.seq * s.seq * s.head_dim >= std::int64_t{1} << 31;
  }

  fe::error_object build(Plan& p) const {
    Graph& graph = p.graph;
    if (fe::error_object e = graph.validate(); e.is_bad()) return e;
    if (fe::error_object e = graph.build_operation_graph(handle); e.is_bad()) return e;
    if (fe::error_object e = graph.create_execution_plans({fe::HeurMode_t::A}); e.is_bad()) return e;
    if (fe::error_object e = graph.check_support(); e.is_bad()) return e;
    const auto policy = p.to_be_tuned ? fe::BuildPlanPolicy_t::ALL : fe::BuildPlanPolicy_t::HEURISTICS_CHOICE;
    if (fe::error_object e = graph.build_plans(policy); e.is_bad()) return e;
    std::int64_t bytes = 0;
    if (fe::error_object e = graph.get_workspace_size(bytes); e.is_bad()) return e;
    p.workspace = static_cast<std::size_t>(p.to_be_tuned ? graph.get_autotune_workspace_size() : bytes);
    return {};
  }

  void execute(Pass pass, const AttentionShape& s, Pointers pointers, void* workspace) {
    Plan& p = plan(pass, s);
    if (p.to_be_tuned && !capturing()) {
      run(pass, s, "tune", [&] { return p.graph.autotune(handle, pointers, workspace); });
      p.to_be_tuned = false;
    }
    run(pass, s, "run", [&] { return p.graph.execute(handle, pointers, workspace); });
  }

  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status), "attention");
    return status != cudaStreamCaptureStatusNone;
  }

  cudnnHandle_t handle = nullptr;
  cudaStream_t stream = nullptr;
  std::size_t version = 0;
  int compute_capability = 0;  // 90
  bool deterministic = false;
  std::map<Key, std::unique_ptr<Plan>> plans;
};

CudnnAttention::CudnnAttention(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
CudnnAttention::~CudnnAttention() = default;

std::string CudnnAttention::why_not() { return reason(); }

std::unique_ptr<CudnnAttention> CudnnAttention::open(cudaStream_t stream, bool deterministic) {
  if (!load()) return nullptr;
  auto impl = std::make_unique<Impl>();
  impl->deterministic = deterministic;
  impl->stream = stream;
  impl->version = fe::detail::get_backend_version();
  if (impl->version < kOldestVersion) {
    reason() = fmt::format("cuDNN {} is too old: {} or later is needed", version_text(impl->version),
                           version_text(kOldestVersion));
    return nullptr;
  }
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "attention");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "attention");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "attention");
  impl->compute_capability = 10 * major + minor;
  try {
    cudnnStatus_t status = fe::detail::create_handle(&impl->handle);
    if (status == CUDNN_STATUS_SUCCESS) status = fe::detail::set_stream(impl->handle, stream);
    if (status != CUDNN_STATUS_SUCCESS) {
      reason() = fmt::format("cuDNN {} does not start on this GPU: {}", version_text(impl->version),
                             fe::detail::get_error_string(status));
      return nullptr;
    }
  } catch (const std::exception& e) {  // a library without the function
    reason() = fmt::format("cuDNN {} cannot be used: {}", version_text(impl->version), e.what());
    return nullptr;
  }
  return std::unique_ptr<CudnnAttention>(new CudnnAttention(std::move(impl)));
}

bool CudnnAttention::supports(const AttentionShape& s) const {
  return s.batch >= 1 && s.seq >= 2 && s.kv_heads >= 1 && s.heads >= 1 && s.heads % s.kv_heads == 0 &&
         s.head_dim >= 8 && s.head_dim <= 128 && s.head_dim % 8 == 0;
}

std::size_t CudnnAttention::forward_workspace(const AttentionShape& s) {
  return impl_->plan(Pass::kForward, s).workspace;
}
std::size_t CudnnAttention::backward_workspace(const AttentionShape& s) {
  return impl_->plan(Pass::kBackward, backward_part(s, impl_->deterministic)).workspace;
}

void CudnnAttention::forward(bf16* out, float* lse, const bf16* qkv, const AttentionShape& s,
                             void* workspace) {
  bf16* const in = const_cast<bf16*>(qkv);  // cuDNN takes every pointer as void*; inputs are only read
  impl_->execute(
      Pass::kForward, s,
      {{kQuery, in}, {kKey, in + key_offset(s)}, {kValue, in + value_offset(s)}, {kOut, out}, {kLse, lse}},
      workspace);
}

void CudnnAttention::backward(bf16* dqkv, const bf16* dout, const bf16* out, const float* lse,
                              const bf16* qkv, const AttentionShape& s, void* workspace) {
  const AttentionShape part = backward_part(s, impl_->deterministic);
  for (std::int64_t b = 0; b < s.batch; b += part.batch) {
    const std::int64_t row = b * s.seq;
    bf16* const in = const_cast<bf16*>(qkv) + row * qkv_row(s);
    bf16* const din = dqkv + row * qkv_row(s);
    impl_->execute(Pass::kBackward, part,
                   {{kQuery, in},
                    {kKey, in + key_offset(s)},
                    {kValue, in + value_offset(s)},
                    {kOut, const_cast<bf16*>(out) + row * out_row(s)},
                    {kLse, const_cast<float*>(lse) + row * s.heads},
                    {kDout, const_cast<bf16*>(dout) + row * out_row(s)},
                    {kDquery, din},
                    {kDkey, din + key_offset(s)},
                    {kDvalue, din + value_offset(s)}},
                   workspace);
  }
}

std::string CudnnAttention::version() const { return version_text(impl_->version); }

}  // namespace fathom::cuda
