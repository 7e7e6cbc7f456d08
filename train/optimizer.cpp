#include "train/optimizer.h"

#include <utility>
#include <vector>

#include "src/ops/loss.h"

namespace fathom {

namespace {

// The kernels' three groups are these.
static_assert(kParameterGroups == kClipGroups && static_cast<int>(ParameterGroup::Decayed) == 0 &&
              static_cast<int>(ParameterGroup::Undecayed) == 1 &&
              static_cast<int>(ParameterGroup::Predictor) == 2);

Tensor part(const Tensor& arena, const ArenaRange& range) {
  return arena.rows(range.begin, range.begin + range.size);
}

}  // namespace

AdamW::AdamW(Context& c, const ParameterSet& parameters, const TrainConfig& config)
    : AdamW(c, config, Shards(parameters)) {}

AdamW::AdamW(Context& c, const TrainConfig& config, Shards shards)
    : shards_(std::move(shards)), config_(config) {
  const Shape shape{shards_.owned()};
  if (!shards_.has_all()) squares_ = c.empty_stat({static_cast<std::int64_t>(shards_.buckets().size())});
  state_.m = c.zeros(shape, c.stat_dtype(), MemoryTag::Optimizer);
  state_.v = c.zeros(shape, c.stat_dtype(), MemoryTag::Optimizer);
  numbers_ = c.empty({static_cast<std::int64_t>(kParameterGroups) * kUpdateNumbers}, DType::F64,
                     MemoryTag::Optimizer);
}

AdamW::Norms AdamW::norms(Context& c, const ParameterSet& parameters) {
  const Tensor squares = c.empty_stat({static_cast<std::int64_t>(kParameterGroups)});
  record_norms(c, parameters, squares);
  return norms_of(to_doubles(c.backend(), squares).data());
}

void AdamW::record_norms(Context& c, const ParameterSet& parameters, const Tensor& squares) {
  for (std::size_t g = 0; g < kParameterGroups; ++g) {
    const auto at = static_cast<std::int64_t>(g);
    c.backend().sum_squares(squares.rows(at, at + 1),
                            part(parameters.gradients(), parameters.range(static_cast<ParameterGroup>(g))));
  }
}

void AdamW::record_own_norms(Context& c, const ParameterSet& parameters, const Tensor& squares) {
  if (shards_.has_all()) {
    record_norms(c, parameters, squares);
    return;
  }
  Backend& backend = c.backend();
  backend.fill(squares, 0.0);
  const auto& buckets = shards_.buckets();
  const auto count = static_cast<std::int64_t>(buckets.size());
  std::int64_t first = 0;  // of the group
  for (std::int64_t i = 0; i < count; ++i) {
    const Shards::Bucket& b = buckets[static_cast<std::size_t>(i)];
    backend.sum_squares(squares_.rows(i, i + 1), part(parameters.gradients(), b.own));
    if (i + 1 < count && buckets[static_cast<std::size_t>(i) + 1].group == b.group) continue;
    const auto group = static_cast<std::int64_t>(b.group);
    backend.sum(squares.rows(group, group + 1), squares_.rows(first, i + 1));
    first = i + 1;
  }
}

AdamW::Norms AdamW::norms_of(const double* squares) { return {model_norm(squares), predictor_norm(squares)}; }

void AdamW::update(Context& c, ParameterSet& parameters, const Norms& norms, double lr, std::int64_t step) {
  StepRule rule;
  rule.grad_clip = config_.grad_clip;
  const double of_model = clip_factor(rule, norms.model);
  set_numbers(c, lr, step, {of_model, of_model, clip_factor(rule, norms.predictor)});
  record_update(c, parameters);
}

void AdamW::prepare(Context& c, double lr, std::int64_t step) { set_numbers(c, lr, step, {1.0, 1.0, 1.0}); }

void AdamW::set_numbers(Context& c, double lr, std::int64_t step, const double (&scales)[kParameterGroups]) {
  const AdamWParams betas{config_.betas[0], config_.betas[1]};
  std::vector<double> all;
  for (const double scale : scales) {
    const UpdateNumbers n = update_numbers(betas, lr, step, scale);
    all.insert(all.end(), {n.lr, n.bias1, n.root_bias2, n.gradient_scale, n.applied});
  }
  from_host(c.backend(), numbers_, all);
}

void AdamW::record_update(Context& c, ParameterSet& parameters) {
  for (const Shards::Bucket& bucket : shards_.buckets()) {
    const ArenaRange& own = bucket.own;
    if (own.size == 0) continue;
    const ArenaRange moments{bucket.moments, own.size};
    const AdamWParams p{config_.betas[0], config_.betas[1], config_.eps,
                        bucket.group == ParameterGroup::Decayed ? config_.weight_decay : 0.0};
    const auto at = static_cast<std::int64_t>(bucket.group) * kUpdateNumbers;
    const View working = parameters.working().defined() ? part(parameters.working(), own).view() : View{};
    c.backend().adamw(part(parameters.masters(), own), working, part(state_.m, moments),
                      part(state_.v, moments), part(parameters.gradients(), own),
                      numbers_.rows(at, at + kUpdateNumbers), p);
  }
}

void begin_gradients(Context& c, const ParameterSet& parameters) {
  for (const ParameterGroup group : {ParameterGroup::Undecayed, ParameterGroup::Predictor}) {
    c.backend().fill(part(parameters.gradients(), parameters.range(group)), 0.0);
  }
  for (const ParameterSpec& spec : parameters.specs()) {
    if (spec.group == ParameterGroup::Decayed)
      parameters.get(spec.name).bound_gradient().set_begins_anew(true);
  }
}

void settle_gradients(Context& c, const ParameterSet& parameters, std::int64_t from) {
  for (const ParameterSpec& spec : parameters.specs()) {
    if (parameters.offset(spec.name) < from) continue;
    const Tensor& gradient = parameters.get(spec.name).bound_gradient();
    if (!gradient.begins_anew()) continue;
    c.backend().fill(gradient, 0.0);
    gradient.set_begins_anew(false);
  }
}

}  // namespace fathom
