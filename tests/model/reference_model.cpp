#include "tests/model/reference_model.h"

#include <algorithm>
#include <cmath>

namespace fathom::known_bugs {

namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

Values row(const Values& x, std::int64_t i, std::int64_t width) {
  return {x.begin() + i * width, x.begin() + (i + 1) * width};
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// W x, W of rows as long as x.
Values product(const Values& w, const Values& x) {
  Values y;
  for (std::size_t begin = 0; begin < w.size(); begin += x.size()) {
    double sum = 0;
    for (std::size_t j = 0; j < x.size(); ++j) sum += w[begin + j] * x[j];
    y.push_back(sum);
  }
  return y;
}

Values norm(const Values& x, const Values& w, double eps) {
  const double mean = dot(x, x) / static_cast<double>(x.size());
  Values y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] / std::sqrt(mean + eps) * w[i];
  return y;
}

double silu(double x) { return x * sigmoid(x); }

Values sum(const Values& a, const Values& b) {
  Values y(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) y[i] = a[i] + b[i];
  return y;
}

}  // namespace

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

std::vector<std::int32_t> RoutedRows::rows() const {
  std::vector<std::int32_t> all;
  for (std::size_t i = 0; i < kept.size(); ++i) {
    if (kept[i]) all.push_back(static_cast<std::int32_t>(i));
  }
  return all;
}

const Values& ReferenceModel::weight(std::int64_t layer, const std::string& name) const {
  return p_.at("model.layers." + std::to_string(layer) + "." + name);
}

void ReferenceModel::choose(RoutedRows& rows, const Sequences& in, const Choice& choice) const {
  rows.kept.assign(rows.scores.size(), false);
  if (choice.by != Choice::By::TopK) {
    const Values& logits = choice.by == Choice::By::Router ? rows.scores : rows.predicted;
    for (std::size_t i = 0; i < logits.size(); ++i) rows.kept[i] = sigmoid(logits[i]) > choice.threshold;
    return;
  }
  const auto keep = std::max<std::int64_t>(
      1, static_cast<std::int64_t>(std::floor(r_.capacity * static_cast<double>(in.seq))));
  for (std::int64_t b = 0; b < in.batch; ++b) {
    for (std::int64_t taken = 0; taken < keep; ++taken) {
      std::int64_t best = -1;
      for (std::int64_t i = b * in.seq; i < (b + 1) * in.seq; ++i) {
        if (!rows.kept[at(i)] && (best < 0 || rows.scores[at(i)] > rows.scores[at(best)])) best = i;
      }
      rows.kept[at(best)] = true;
    }
  }
}

Values ReferenceModel::block(std::int64_t layer, const Values& x, const Sequences& in,
                             const std::vector<bool>& kept) const {
  const std::int64_t width = m_.width, d = m_.head_dim(), half = d / 2, rows = in.batch * in.seq;
  const std::int64_t group = m_.heads / m_.kv_heads;
  std::vector<Values> qkv(at(rows));
  for (std::int64_t i = 0; i < rows; ++i) {
    if (!kept[at(i)]) continue;
    Values& v = qkv[at(i)];
    v = product(weight(layer, "self_attn.qkv_proj.weight"),
                norm(row(x, i, width), weight(layer, "input_layernorm.weight"), m_.norm_eps));
    for (std::int64_t head = 0; head < m_.heads + m_.kv_heads; ++head) {  // values are not rotated
      for (std::int64_t e = 0; e < half; ++e) {
        const double angle = static_cast<double>(i % in.seq) *
                             std::pow(m_.rope_theta, -2.0 * static_cast<double>(e) / static_cast<double>(d));
        double& a = v[at(head * d + e)];
        double& b = v[at(head * d + e + half)];
        const double rotated = a * std::cos(angle) - b * std::sin(angle);
        b = b * std::cos(angle) + a * std::sin(angle);
        a = rotated;
      }
    }
  }
  Values f(x.size(), 0.0);
  for (std::int64_t i = 0; i < rows; ++i) {
    if (!kept[at(i)]) continue;
    Values mixed(at(m_.heads * d), 0.0);
    for (std::int64_t h = 0; h < m_.heads; ++h) {
      const std::int64_t key = (m_.heads + h / group) * d, value = key + m_.kv_heads * d;
      Values weights;
      std::vector<std::int64_t> seen;
      for (std::int64_t j = i / in.seq * in.seq; j <= i; ++j) {
        if (!kept[at(j)] || (!in.documents.empty() && in.documents[at(i)] != in.documents[at(j)])) continue;
        double score = 0;
        for (std::int64_t e = 0; e < d; ++e) score += qkv[at(i)][at(h * d + e)] * qkv[at(j)][at(key + e)];
        weights.push_back(std::exp(score / std::sqrt(static_cast<double>(d))));
        seen.push_back(j);
      }
      double total = 0;
      for (double w : weights) total += w;
      for (std::size_t k = 0; k < seen.size(); ++k) {
        for (std::int64_t e = 0; e < d; ++e) {
          mixed[at(h * d + e)] += weights[k] / total * qkv[at(seen[k])][at(value + e)];
        }
      }
    }
    const Values a = product(weight(layer, "self_attn.o_proj.weight"), mixed);
    const Values in_mlp =
        norm(sum(row(x, i, width), a), weight(layer, "post_attention_layernorm.weight"), m_.norm_eps);
    const Values gate_up = product(weight(layer, "mlp.gate_up_proj.weight"), in_mlp);
    Values hidden;
    for (std::int64_t e = 0; e < m_.ffn_hidden; ++e) {
      hidden.push_back(silu(gate_up[at(e)]) * gate_up[at(m_.ffn_hidden + e)]);
    }
    const Values m = product(weight(layer, "mlp.down_proj.weight"), hidden);
    for (std::int64_t e = 0; e < width; ++e) f[at(i * width + e)] = a[at(e)] + m[at(e)];
  }
  return f;
}

ReferenceResult ReferenceModel::run(const Sequences& in, const Choice& choice) const {
  const std::int64_t width = m_.width, rows = in.batch * in.seq;
  ReferenceResult result;
  Values x;
  for (std::int32_t token : in.tokens) {
    const Values v = row(p_.at("model.embed_tokens.weight"), token, width);
    x.insert(x.end(), v.begin(), v.end());
  }
  result.streams.push_back(x);
  for (std::int64_t layer = 0; layer < m_.depth; ++layer) {
    std::vector<bool> kept(at(rows), true);
    Values gate(at(rows), 1.0);
    if (r_.routes(layer)) {
      RoutedRows& routed = result.routed[layer];
      for (std::int64_t i = 0; i < rows; ++i) {
        const Values v = row(x, i, width);
        routed.scores.push_back(dot(v, weight(layer, "router.weight")));
        const double r = routed.scores.back();
        gate[at(i)] = r_.gate == Gate::Raw ? r : r_.gate == Gate::Sigmoid ? sigmoid(r) : std::tanh(r);
        if (!r_.has_predictor()) continue;
        Values hidden = sum(product(weight(layer, "router_predictor.0.weight"), v),
                            weight(layer, "router_predictor.0.bias"));
        for (double& e : hidden) e = silu(e);
        routed.predicted.push_back(dot(hidden, weight(layer, "router_predictor.2.weight")) +
                                   weight(layer, "router_predictor.2.bias")[0]);
      }
      choose(routed, in, choice);
      kept = routed.kept;
    }
    const Values f = block(layer, x, in, kept);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += gate[i / at(width)] * f[i];
    result.streams.push_back(x);
  }
  const Values& head = p_.at(m_.tie_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
  for (std::int64_t i = 0; i < rows; ++i) {
    const Values v = product(head, norm(row(x, i, width), p_.at("model.norm.weight"), m_.norm_eps));
    result.logits.insert(result.logits.end(), v.begin(), v.end());
  }
  return result;
}

double ReferenceModel::cross_entropy(const Sequences& in, const Choice& choice) const {
  const ReferenceResult result = run(in, choice);
  double loss = 0;
  for (std::int64_t i = 0; i < in.batch * in.seq; ++i) {
    const Values logits = row(result.logits, i, m_.vocab_size);
    double total = 0;
    for (double z : logits) total += std::exp(z);
    loss += std::log(total) - logits[at(in.targets[at(i)])];
  }
  return loss / static_cast<double>(in.batch * in.seq);
}

double ReferenceModel::predictor_loss(const ReferenceResult& result) const {
  double loss = 0;
  for (const auto& [layer, routed] : result.routed) {
    for (std::size_t i = 0; i < routed.kept.size(); ++i) {
      const double p = sigmoid(routed.predicted[i]);
      loss -= std::log(routed.kept[i] ? p : 1 - p) / static_cast<double>(routed.kept.size());
    }
  }
  return loss / static_cast<double>(result.routed.size());
}

}  // namespace fathom::known_bugs
