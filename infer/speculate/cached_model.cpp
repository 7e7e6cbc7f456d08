#include "infer/speculate/cached_model.h"

#include <algorithm>
#include <numeric>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/ops/routing.h"

namespace fathom {

std::size_t common_prefix(std::span<const std::int32_t> a, std::span<const std::int32_t> b) {
  const std::size_t n = std::min(a.size(), b.size());
  return static_cast<std::size_t>(
      std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin()).first - a.begin());
}

// What rows may need is room in every routed layer, and what they keep is a part of that: where there is not
// so much, fewer rows go first. Only the first `divisible` of them can. 0: not even the fewest fit.
std::int64_t CachedModel::rows_that_fit(SequenceId sequence, std::int64_t rows,
                                        std::int64_t divisible) const {
  while (rows > 0) {
    const NewRows next{sequence, rows};
    if (cache.fits({&next, 1})) return rows;
    rows = std::min(rows / 2, divisible);
  }
  return 0;
}

std::vector<float> CachedModel::add(SequenceId sequence, std::span<const std::int32_t> tokens,
                                    std::int64_t position, std::int64_t wanted) const {
  const NoGrad no_grad(c);
  const auto size = static_cast<std::int64_t>(tokens.size());
  std::vector<float> found;
  const auto append_rows = [&](const std::vector<float>& all) {
    const auto width = static_cast<std::ptrdiff_t>(model.config().vocab_size);
    for (std::int64_t i = 0; i < wanted; ++i)
      found.insert(found.end(), all.begin() + i * width, all.begin() + i * width + vocab);
  };
  // The rows that are wanted come in one pass.
  const std::int64_t before = size - std::max<std::int64_t>(wanted, std::min(size, max_rows));
  for (std::int64_t done = 0; done < size;) {
    const std::int64_t n = rows_that_fit(
        sequence, done < before ? std::min(max_rows, before - done) : size - done, size - done - wanted);
    if (n == 0) {
      throw UserError(
          fmt::format("The cache ({} blocks of {}) holds no more than the {} tokens of this text.",
                      cache.pool().blocks(), cache.block(), position + done),
          "Give the cache more memory.");
    }
    HostBatch host;
    host.batch = 1;
    host.seq = n;
    host.tokens.assign(tokens.begin() + done, tokens.begin() + done + n);
    host.positions.resize(static_cast<std::size_t>(n));
    std::iota(host.positions.begin(), host.positions.end(), static_cast<std::int32_t>(position + done));
    host.documents.assign(static_cast<std::size_t>(n), 0);
    const NewRows rows{sequence, n};
    if (whole != nullptr && size == 1 && wanted == 1) {
      const bool skips = rule.blocks == Causal::Blocks::Skipped;  // nothing is above 1
      const StepRow row{.sequence = sequence,
                        .token = tokens[0],
                        .position = position,
                        .threshold = skips ? 1 : rule.threshold};
      const std::vector<DecoderResult> results = whole->run({&row, 1});
      if (counts != nullptr) counts->add(results.front());
      found = whole->logits(0);
      found.resize(static_cast<std::size_t>(vocab));
      return found;
    }
    if (passes != nullptr && n == size && wanted > 0 && size <= ShortPasses::kMostRows) {
      append_rows(passes->run(sequence, tokens, position, wanted));
      if (counts != nullptr) counts->rows += n;
      return found;
    }
    Batch batch = upload(c, host);
    batch.cache = &cache;
    cache.begin(c, {&rows, 1});
    const ForwardResult result = model.forward(c, batch, rule);
    if (counts != nullptr) counts->add(result, n);
    done += n;
    if (done < size || wanted == 0) continue;
    std::vector<std::int32_t> last(static_cast<std::size_t>(wanted));
    std::iota(last.begin(), last.end(), static_cast<std::int32_t>(n - wanted));
    const Tensor at = c.empty({wanted}, DType::I32);
    from_host(c.backend(), at, last);
    append_rows(to_floats(c.backend(), model.logits(c, ops::gather_rows(c, result.hidden, at))));
  }
  return found;
}

}  // namespace fathom
