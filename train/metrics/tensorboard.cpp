#include "train/metrics/tensorboard.h"

#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"

namespace fathom {
namespace {

constexpr std::array<std::uint32_t, 256> make_crc_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82F63B78u : 0u);
    table[i] = crc;
  }
  return table;
}

template <typename T>
void put_fixed(std::string& out, T value) {
  static_assert(std::endian::native == std::endian::little);
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  out.append(bytes, sizeof value);
}

// Protobuf's wire format: a key is (field << 3 | type); types: 0 varint, 1 fixed64, 2 length-delimited, 5
// fixed32.
void put_varint(std::string& out, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
}

void put_key(std::string& out, unsigned field, unsigned type) { put_varint(out, field << 3 | type); }

void put_bytes(std::string& out, unsigned field, std::string_view bytes) {
  put_key(out, field, 2);
  put_varint(out, bytes.size());
  out.append(bytes);
}

// Event: wall_time 1 (double), step 2 (int64), file_version 3, summary 5, session_log 7.
std::string event(std::int64_t step, unsigned field, std::string_view content) {
  const std::chrono::duration<double> now = std::chrono::system_clock::now().time_since_epoch();
  std::string out;
  put_key(out, 1, 1);
  put_fixed(out, now.count());
  if (step != 0) {
    put_key(out, 2, 0);
    put_varint(out, static_cast<std::uint64_t>(step));
  }
  put_bytes(out, field, content);
  return out;
}

std::string framed(std::string_view payload) {
  std::string length;
  put_fixed(length, static_cast<std::uint64_t>(payload.size()));
  std::string out = length;
  put_fixed(out, masked_crc32c(length));
  out.append(payload);
  put_fixed(out, masked_crc32c(payload));
  return out;
}

// Summary: repeated value 1; a value: tag 1 (string), simple_value 2 (float).
class Summary {
 public:
  void add(std::string_view tag, double value) {
    std::string entry;
    put_bytes(entry, 1, tag);
    put_key(entry, 2, 5);
    put_fixed(entry, static_cast<float>(value));
    put_bytes(bytes_, 1, entry);
  }
  void add(std::string_view tag, const std::optional<double>& value) {
    if (value) add(tag, *value);
  }
  void add_by_layer(std::string_view name, const std::vector<std::int64_t>& layers,
                    const std::vector<double>& values) {
    for (std::size_t i = 0; i < values.size() && i < layers.size(); ++i) {
      add(fmt::format("routing/layer_{}/{}", layers[i], name), values[i]);
    }
  }
  std::string framed_event(std::int64_t step) const { return framed(event(step, 5, bytes_)); }

 private:
  std::string bytes_;
};

std::string host_name() {
  char name[256] = {};
  if (::gethostname(name, sizeof name - 1) != 0 || name[0] == '\0') return "localhost";
  return name;
}

}  // namespace

std::uint32_t crc32c(std::string_view bytes) {
  static constexpr std::array<std::uint32_t, 256> table = make_crc_table();
  std::uint32_t crc = ~0u;
  for (const char c : bytes) crc = (crc >> 8) ^ table[(crc ^ static_cast<unsigned char>(c)) & 0xFF];
  return ~crc;
}

std::uint32_t masked_crc32c(std::string_view bytes) { return std::rotr(crc32c(bytes), 15) + 0xA282EAD8u; }

TensorBoardWriter::TensorBoardWriter(const std::filesystem::path& folder, std::int64_t step) {
  static std::atomic<int> files{0};  // two writers of one process within a second
  path_ = folder / fmt::format("events.out.tfevents.{:010}.{}.{}.{}",
                               static_cast<std::int64_t>(
                                   std::chrono::system_clock::to_time_t(std::chrono::system_clock::now())),
                               host_name(), ::getpid(), files++);
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
  if (fd_ < 0) {
    throw UserError(
        "cannot create the TensorBoard file " + path_.string() + ": " + std::strerror(errno) + ".",
        "Check that the run folder exists and is writable.");
  }
  std::string head = framed(event(0, 3, "brain.Event:2"));
  if (step > 0) {
    // SessionLog: status 1 (START = 1). TensorBoard drops what other files hold from this event's step on.
    std::string session;
    put_key(session, 1, 0);
    put_varint(session, 1);
    head += framed(event(step + 1, 7, session));
  }
  write(head);
}

TensorBoardWriter::~TensorBoardWriter() {
  if (fd_ >= 0) ::close(fd_);
}

TensorBoardWriter::TensorBoardWriter(TensorBoardWriter&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}

void TensorBoardWriter::write(const std::string& bytes) { write_fully(fd_, bytes, path_.string()); }

void TensorBoardWriter::scalar(std::string_view tag, std::int64_t step, double value) {
  Summary summary;
  summary.add(tag, value);
  write(summary.framed_event(step));
}

void TensorBoardWriter::add(const StepRecord& r) {
  Summary s;
  s.add("train/loss", r.loss);
  s.add("train/loss_average", r.loss_average);
  s.add("train/lr", r.lr);
  s.add("train/grad_norm", r.grad_norm);
  s.add("train/aux_loss", r.aux_loss);
  s.add("train/predictor_loss", r.predictor_loss);
  s.add("train/balance_loss", r.balance_loss);
  s.add("train/z_loss", r.z_loss);
  s.add("train/expert_aux_loss", r.expert_aux_loss);
  s.add("train/expert_predictor_loss", r.expert_predictor_loss);
  s.add("speed/tokens_per_s", r.tokens_per_s);
  s.add("speed/gflop_per_s", r.flops_per_s * 1e-9);
  s.add("speed/mfu", r.mfu);
  const auto mib = [](const std::optional<double>& bytes) {
    return bytes ? std::optional(*bytes / 1048576.0) : std::nullopt;
  };
  s.add("speed/memory_mib", mib(r.memory_bytes));
  s.add("speed/memory_held_mib", mib(r.memory_held_bytes));
  s.add("speed/device_used_mib", mib(r.device_used_bytes));
  s.add("progress/tokens", static_cast<double>(r.tokens));
  s.add("progress/flops", r.flops);
  s.add("routing/predictor_accuracy", r.predictor_accuracy);
  s.add("routing/expert_accuracy", r.expert_accuracy);
  s.add_by_layer("fraction", r.routed_layers, r.routed_fraction);
  for (std::size_t i = 0; i < r.router.size() && i < r.routed_layers.size(); ++i) {
    const std::string prefix = fmt::format("routing/layer_{}/logit_", r.routed_layers[i]);
    s.add(prefix + "mean", r.router[i].mean);
    s.add(prefix + "min", r.router[i].min);
    s.add(prefix + "max", r.router[i].max);
    s.add(prefix + "above_half", r.router[i].above_half);
  }
  for (const auto& [key, member] : kExpertKeys) {
    std::vector<double> values;
    for (const ExpertStats& e : r.experts) values.push_back(e.*member);
    s.add_by_layer(key, r.expert_layers, values);
  }
  write(s.framed_event(r.step));
}

void TensorBoardWriter::add(const EvalRecord& r) {
  Summary s;
  s.add("val/loss", r.val_loss);
  s.add("val/topk", r.val_topk);
  s.add("val/causal", r.val_causal);
  s.add("val/bits_per_byte", r.bits_per_byte);
  s.add("val/router_recall", r.router_recall);
  s.add("val/router_precision", r.router_precision);
  s.add("val/causal_flops_per_token", r.causal_flops_per_token);
  s.add_by_layer("realised_capacity", r.routed_layers, r.realised_capacity);
  s.add_by_layer("recall", r.routed_layers, r.router_recall_by_layer);
  s.add_by_layer("precision", r.routed_layers, r.router_precision_by_layer);
  s.add("val/expert_recall", r.expert_recall);
  s.add("val/expert_precision", r.expert_precision);
  s.add_by_layer("expert_recall", r.expert_layers, r.expert_recall_by_layer);
  s.add_by_layer("expert_precision", r.expert_layers, r.expert_precision_by_layer);
  write(s.framed_event(r.step));
}

}  // namespace fathom
