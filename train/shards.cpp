#include "train/shards.h"

#include <algorithm>

#include "src/core/stopwatch.h"
#include "train/optimizer.h"

namespace fathom {

namespace {

// Parts begin where parameters may (src/nn): at multiples of 128 elements.
constexpr std::int64_t kUnit = 128;

Tensor part(const Tensor& arena, const ArenaRange& range) {
  return arena.rows(range.begin, range.begin + range.size);
}

// `units` in equal parts; the first ranks have one more where they do not divide.
std::vector<std::int64_t> share_out(std::int64_t units, int ranks) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(ranks));
  for (int r = 0; r < ranks; ++r)
    counts[static_cast<std::size_t>(r)] = (units / ranks + (r < units % ranks ? 1 : 0)) * kUnit;
  return counts;
}

void gather(Communicator& ranks, const Tensor& arena, const Shards::Bucket& bucket) {
  ranks.all_gather(part(arena, bucket.range), bucket.counts);
}

}  // namespace

Shards::Shards(const ParameterSet& parameters) : Shards(parameters, 0, 1) {}

Shards::Shards(const ParameterSet& parameters, int rank, int ranks, std::int64_t bucket_elements)
    : ranks_(ranks) {
  const std::int64_t most = std::max(bucket_elements / (kUnit * ranks), std::int64_t{1}) * kUnit * ranks;
  for (std::size_t g = 0; g < kParameterGroups; ++g) {
    const auto group = static_cast<ParameterGroup>(g);
    const ArenaRange all = parameters.range(group);
    elements_ = std::max(elements_, all.begin + all.size);
    const std::int64_t size = ranks == 1 ? all.size : most;
    for (std::int64_t done = 0; done < all.size; done += size) {
      Bucket b;
      b.group = group;
      b.range = {all.begin + done, std::min(size, all.size - done)};
      b.counts = share_out(b.range.size / kUnit, ranks);
      b.own = {b.range.begin + offset_of(b.counts, rank), b.counts[static_cast<std::size_t>(rank)]};
      b.moments = owned_;
      owned_ += b.own.size;
      buckets_.push_back(std::move(b));
    }
  }
}

GradientReduction::GradientReduction(Context& c, Communicator& ranks, const ParameterSet& parameters,
                                     const Shards& shards, const Tensor& sent)
    : context_(c), ranks_(ranks), parameters_(parameters), shards_(shards), sent_(sent) {
  if (ranks_.alone()) return;
  for (const Shards::Bucket& b : shards_.buckets()) left_ += b.group == ParameterGroup::Decayed ? 1 : 0;
  // Matrices stand in the order of the layers.
  static const std::string kPrefix = "model.layers.";
  for (const ParameterSpec& spec : parameters.specs()) {
    if (spec.group != ParameterGroup::Decayed || !spec.name.starts_with(kPrefix)) continue;
    const std::size_t end = spec.name.find('.', kPrefix.size());
    const std::string layer = "layer " + spec.name.substr(kPrefix.size(), end - kPrefix.size());
    const auto [found, is_first] = begins_.try_emplace(layer, parameters.offset(spec.name));
    if (!is_first) found->second = std::min(found->second, parameters.offset(spec.name));
  }
}

void GradientReduction::begin(const Shards::Bucket& bucket) {
  const Tensor gradients = part(parameters_.gradients(), bucket.range);
  if (!sent_.defined()) return ranks_.reduce_scatter(gradients, bucket.counts);
  const Tensor rounded = part(sent_, bucket.range);
  context_.backend().cast(rounded, gradients);
  ranks_.reduce_scatter(rounded, bucket.counts);
}

void GradientReduction::layer_done(const std::string& layer) {
  const auto found = begins_.find(layer);
  if (found == begins_.end()) return;
  const Stopwatch watch;
  settle_gradients(context_, parameters_, found->second);
  for (; left_ > 0 && shards_.buckets()[left_ - 1].range.begin >= found->second; --left_)
    begin(shards_.buckets()[left_ - 1]);
  seconds_ += watch.seconds();
}

void GradientReduction::finish() {
  if (ranks_.alone()) return;
  for (; left_ > 0; --left_) begin(shards_.buckets()[left_ - 1]);
  for (const Shards::Bucket& b : shards_.buckets()) {
    if (b.group != ParameterGroup::Decayed) begin(b);
  }
  ranks_.finish();
  if (!sent_.defined()) return;
  for (const Shards::Bucket& b : shards_.buckets()) {
    if (b.own.size > 0) context_.backend().cast(part(parameters_.gradients(), b.own), part(sent_, b.own));
  }
}

void gather_weights(Communicator& ranks, const ParameterSet& parameters, const Shards& shards) {
  if (ranks.alone()) return;
  const bool has_copy = parameters.working().defined();
  for (const Shards::Bucket& b : shards.buckets()) {
    if (has_copy) gather(ranks, parameters.working(), b);
    // Vectors, of which the forward pass reads the masters, are among these.
    if (!has_copy || b.group != ParameterGroup::Decayed) gather(ranks, parameters.masters(), b);
  }
  ranks.finish();
}

void gather_masters(Communicator& ranks, const ParameterSet& parameters, const Shards& shards) {
  if (ranks.alone() || !parameters.working().defined()) return;  // gather_weights has done it
  for (const Shards::Bucket& b : shards.buckets()) {
    if (b.group == ParameterGroup::Decayed) gather(ranks, parameters.masters(), b);
  }
  ranks.finish();
}

void spread_masters(Communicator& ranks, Context& c, ParameterSet& parameters) {
  if (ranks.alone()) return;
  ranks.broadcast(parameters.masters(), 0);
  ranks.finish();
  parameters.refresh_working_copy(c);
}

void gather_moment(Communicator& ranks, Context& c, const Tensor& owned, const Tensor& all,
                   const Shards& shards) {
  for (const Shards::Bucket& b : shards.buckets()) {
    if (b.own.size > 0) c.backend().copy(part(all, b.own), part(owned, {b.moments, b.own.size}));
    gather(ranks, all, b);
  }
  ranks.finish();
}

void spread_moment(Communicator& ranks, Context& c, const Tensor& all, const Tensor& owned,
                   const Shards& shards) {
  ranks.broadcast(all, 0);
  ranks.finish();
  for (const Shards::Bucket& b : shards.buckets()) {
    if (b.own.size > 0) c.backend().copy(part(owned, {b.moments, b.own.size}), part(all, b.own));
  }
}

}  // namespace fathom
