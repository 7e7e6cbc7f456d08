#include "infer/quant/rotate.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "infer/pieces.h"
#include "kernels/error.h"
#include "kernels/hadamard.h"
#include "src/core/splitmix64.h"

namespace fathom {

namespace {

using Values = std::vector<double>;

constexpr std::int64_t kElementsAtOnce = 1 << 16;  // of a piece, which one thread does

/// transform(row) of all rows of `length`, by all threads.
template <typename Transform>
void for_rows(std::span<double> matrix, std::size_t length, Transform&& transform) {
  const auto rows = static_cast<std::int64_t>(matrix.size() / length),
             of_row = static_cast<std::int64_t>(length);
  for_pieces(rows, std::max<std::int64_t>(1, kElementsAtOnce / of_row), [&](auto begin, auto end) {
    for (auto row = static_cast<std::size_t>(begin); row < static_cast<std::size_t>(end); ++row)
      transform(matrix.subspan(row * length, length));
  });
}

/// transform(column) of all columns of a matrix of `length` rows, by all threads. A few neighbouring columns
/// are brought together: a row of these is a line of the caches.
template <typename Transform>
void for_columns(std::span<double> matrix, std::size_t length, Transform&& transform) {
  constexpr std::size_t kSide = 16;
  const std::size_t in = matrix.size() / length;
  for_pieces(static_cast<std::int64_t>((in + kSide - 1) / kSide), 1, [&](auto begin, auto end) {
    Values columns(kSide * length);
    for (auto piece = static_cast<std::size_t>(begin); piece < static_cast<std::size_t>(end); ++piece) {
      const std::size_t first = piece * kSide, count = std::min(kSide, in - first);
      for (std::size_t i = 0; i < length; ++i) {
        for (std::size_t j = 0; j < count; ++j) columns[j * length + i] = matrix[i * in + first + j];
      }
      for (std::size_t j = 0; j < count; ++j) transform(std::span(columns).subspan(j * length, length));
      for (std::size_t i = 0; i < length; ++i) {
        for (std::size_t j = 0; j < count; ++j) matrix[i * in + first + j] = columns[j * length + i];
      }
    }
  });
}

/// R S on vectors of the stream.
class StreamRotation {
 public:
  StreamRotation(std::int64_t width, std::uint64_t seed) : transform_(width) {
    for (std::int64_t i = 0; i < width; ++i)
      signs_.push_back(mix64(seed * kGoldenGamma + static_cast<std::uint64_t>(i)) >> 63 != 0 ? -1.0 : 1.0);
  }
  std::size_t width() const { return signs_.size(); }
  void apply(std::span<double> x) const {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] *= signs_[i];
    transform_.apply(x);
  }
  void rows(std::span<double> matrix) const {
    for_rows(matrix, width(), [&](std::span<double> row) { apply(row); });
  }
  /// Of a matrix [width, in]: R S W.
  void columns(std::span<double> matrix) const {
    for_columns(matrix, width(), [&](std::span<double> column) { apply(column); });
  }

 private:
  HadamardTransform transform_;
  Values signs_;
};

/// A model's parameters on the host, by name.
class Parameters {
 public:
  Parameters(Context& c, const Transformer& model) {
    const ParameterSet& from = model.parameters();
    for (const ParameterSpec& spec : from.specs())
      values_[spec.name] = to_doubles(c.backend(), from.master(spec.name));
  }
  bool has(const std::string& name) const { return values_.contains(name); }
  Values& at(const std::string& name) {
    const auto found = values_.find(name);
    if (found == values_.end()) throw InternalError(fmt::format("[rotate] no parameter {}", name));
    return found->second;
  }
  void set(const std::string& name, Values values) { values_[name] = std::move(values); }

 private:
  std::map<std::string, Values> values_;
};

/// Each row times a norm's scales.
void scale_rows(Values& matrix, const Values& scales) {
  for_rows(matrix, scales.size(), [&](std::span<double> row) {
    for (std::size_t i = 0; i < row.size(); ++i) row[i] *= scales[i];
  });
}

class Rotator {
 public:
  Rotator(Parameters& parameters, const ModelConfig& model, const RotateOptions& options)
      : p_(parameters),
        m_(model),
        online_(options.online),
        stream_(model.width, options.seed),
        head_(model.head_dim()),
        heads_(model.heads),
        hidden_(model.ffn_hidden) {}

  void whole_model(bool tied) {
    Values& embedding = p_.at("model.embed_tokens.weight");
    if (tied) p_.set("lm_head.weight", embedding);
    stream_.rows(embedding);
    reads_norm("model.norm.weight", {"lm_head.weight"});
    for (std::int64_t i = 0; i < m_.depth; ++i) layer(fmt::format("model.layers.{}.", i));
  }

 private:
  /// Matrices that read a norm, of those that there are.
  void reads_norm(const std::string& norm, const std::vector<std::string>& readers) {
    Values& scales = p_.at(norm);
    for (const std::string& name : readers) {
      if (!p_.has(name)) continue;
      scale_rows(p_.at(name), scales);
      stream_.rows(p_.at(name));
    }
    std::fill(scales.begin(), scales.end(), 1.0);
  }
  void layer(const std::string& at) {
    reads_norm(at + "input_layernorm.weight", {at + "self_attn.qkv_proj.weight"});
    rotate_values(p_.at(at + "self_attn.qkv_proj.weight"), p_.at(at + "self_attn.o_proj.weight"));
    if (online_.heads) across_heads(p_.at(at + "self_attn.o_proj.weight"));
    stream_.columns(p_.at(at + "self_attn.o_proj.weight"));
    reads_norm(at + "post_attention_layernorm.weight",
               {at + "mlp.gate_up_proj.weight", at + "mlp.experts.gate_up_proj.weight",
                at + "mlp.router.weight", at + "mlp.router_predictor.0.weight"});
    for (const char* name : {"mlp.down_proj.weight", "mlp.experts.down_proj.weight"}) {
      if (online_.down && p_.has(at + name)) hidden_rows(p_.at(at + name));
    }
    if (p_.has(at + "mlp.down_proj.weight")) stream_.columns(p_.at(at + "mlp.down_proj.weight"));
    if (p_.has(at + "mlp.experts.down_proj.weight")) {
      Values& all = p_.at(at + "mlp.experts.down_proj.weight");
      const std::size_t each = stream_.width() * static_cast<std::size_t>(m_.ffn_hidden);
      for (std::size_t i = 0; i < all.size(); i += each) stream_.columns(std::span(all).subspan(i, each));
    }
    // These read the stream itself.
    for (const char* name : {"router.weight", "router_predictor.0.weight"}) {
      if (p_.has(at + name)) stream_.rows(p_.at(at + name));
    }
  }
  /// v' = R v of each key/value head: R on the columns of its rows; and on each query head's part of o's
  /// rows.
  void rotate_values(Values& qkv, Values& o) const {
    const auto d = static_cast<std::size_t>(m_.head_dim()), width = stream_.width();
    const auto heads = static_cast<std::size_t>(m_.heads), kv_heads = static_cast<std::size_t>(m_.kv_heads);
    for (std::size_t g = 0; g < kv_heads; ++g) {
      for_columns(std::span(qkv).subspan((heads + kv_heads + g) * d * width, d * width), d,
                  [&](std::span<double> column) { head_.apply(column); });
    }
    for_rows(o, d, [&](std::span<double> of_head) { head_.apply(of_head); });
  }

  /// The transform across heads on o's rows: of the heads' elements of the same number.
  void across_heads(Values& o) const {
    const auto d = static_cast<std::size_t>(m_.head_dim()), heads = static_cast<std::size_t>(m_.heads);
    for_rows(o, heads * d, [&](std::span<double> row) {
      Values element(heads);
      for (std::size_t i = 0; i < d; ++i) {
        for (std::size_t h = 0; h < heads; ++h) element[h] = row[i + h * d];
        heads_.apply(element);
        for (std::size_t h = 0; h < heads; ++h) row[i + h * d] = element[h];
      }
    });
  }
  void hidden_rows(Values& down) const {
    const auto hidden = static_cast<std::size_t>(m_.ffn_hidden);
    for_rows(down, hidden, [&](std::span<double> row) { hidden_.apply(row); });
  }

  Parameters& p_;
  const ModelConfig& m_;
  OnlineHadamards online_;
  StreamRotation stream_;
  HadamardTransform head_, heads_, hidden_;
};

}  // namespace

Quantization rotated_only(const RotateOptions& options) {
  return {.method = "rotate-only",
          .bits = 16,
          .rotation_seed = options.seed,
          .kinds = {},
          .online = options.online};
}

std::unique_ptr<Transformer> rotate_model(Context& c, const Transformer& model,
                                          const RotateOptions& options) {
  Parameters parameters(c, model);
  ModelConfig m = model.config();
  Rotator(parameters, m, options).whole_model(m.tie_embeddings);
  m.tie_embeddings = false;
  auto rotated = options.online.any()
                     ? std::make_unique<Transformer>(c, m, model.routing(), rotated_only(options))
                     : std::make_unique<Transformer>(c, m, model.routing(), false);
  ParameterSet& to = rotated->parameters();
  for (const ParameterSpec& spec : to.specs())
    from_doubles(c.backend(), to.master(spec.name), parameters.at(spec.name));
  to.refresh_working_copy(c);
  return rotated;
}

double greatest_outlier(Context& c, const Transformer& model) {
  double greatest = 0;
  for (const ParameterSpec& spec : model.parameters().specs()) {
    if (spec.is_vector()) continue;
    const Values values = to_doubles(c.backend(), model.parameters().master(spec.name));
    // Each expert has a matrix of its own.
    const std::size_t each =
        spec.shape.rank() == 3 ? values.size() / static_cast<std::size_t>(spec.shape[0]) : values.size();
    for (std::size_t first = 0; first < values.size(); first += each) {
      const auto pieces = static_cast<std::int64_t>(each) / kElementsAtOnce + 1;
      std::vector<double> most_of(static_cast<std::size_t>(pieces)), squares_of(most_of.size());
      for_pieces(static_cast<std::int64_t>(each), kElementsAtOnce, [&](auto begin, auto end) {
        const auto piece = static_cast<std::size_t>(begin / kElementsAtOnce);
        for (auto i = first + static_cast<std::size_t>(begin); i < first + static_cast<std::size_t>(end);
             ++i) {
          most_of[piece] = std::max(most_of[piece], std::abs(values[i]));
          squares_of[piece] += values[i] * values[i];
        }
      });
      const double most = *std::max_element(most_of.begin(), most_of.end());
      const double squares = std::accumulate(squares_of.begin(), squares_of.end(), 0.0);
      if (squares > 0) greatest = std::max(greatest, most / std::sqrt(squares / static_cast<double>(each)));
    }
  }
  return greatest;
}

}  // namespace fathom
