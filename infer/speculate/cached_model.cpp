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

// The device has chosen anyhow.
PassRows CachedModel::add_whole(SequenceId sequence, std::int32_t token, std::int64_t position,
                                const WantedRows& rows) const {
  const Wanted what = rows.what;
  const bool skips = rule.blocks == Causal::Blocks::Skipped;  // nothing is above 1
  const StepRow row{.sequence = sequence,
                    .token = token,
                    .position = position,
                    .threshold = skips ? 1 : rule.threshold,
                    .wants_share = what == Wanted::LikeliestAndShare};
  const DecoderResult result = whole->run({&row, 1}).front();
  if (counts != nullptr) counts->add(result);
  PassRows told;
  if (what == Wanted::Shares && c.backend().keeps_rows()) {
    if (const ConstView logits = whole->logits_in_place(0)) {
      told.shares = std::make_shared<HeldRows>(c, logits, logits.size, vocab, rows.temperature);
      return told;
    }
  }
  if (what != Wanted::Logits && what != Wanted::Shares && result.finite) {
    told.choices.push_back({result.token, what == Wanted::LikeliestAndShare ? result.share : 1.0});
    return told;
  }
  told.logits = whole->logits(0);
  told.logits.resize(static_cast<std::size_t>(vocab));
  return told;
}

/// `logits` [rows, V] on the device.
PassRows CachedModel::tell(const Tensor& logits, const WantedRows& what) const {
  const std::int64_t width = model.config().vocab_size, rows = logits.size() / width;
  PassRows told;
  if (what.what == Wanted::Shares && c.backend().keeps_rows()) {
    told.shares = std::make_shared<HeldRows>(c, logits, width, vocab, what.temperature);
    return told;
  }
  if (what.what == Wanted::Likeliest || what.what == Wanted::LikeliestAndShare) {
    TokenPick asked;
    asked.wants_share = what.what == Wanted::LikeliestAndShare;
    std::vector<TokenPick> picks(static_cast<std::size_t>(rows), asked);
    if (c.backend().choose_tokens(picks, logits, width, vocab) &&
        std::all_of(picks.begin(), picks.end(), [](const TokenPick& p) { return p.finite; })) {
      for (const TokenPick& p : picks) told.choices.push_back({p.token, p.share});
      return told;
    }
  }
  told.logits = to_floats(c.backend(), logits);
  if (width == vocab) return told;
  for (std::int64_t i = 1; i < rows; ++i)
    std::copy_n(told.logits.begin() + i * width, vocab, told.logits.begin() + i * vocab);
  told.logits.resize(static_cast<std::size_t>(rows * vocab));
  return told;
}

PassRows CachedModel::add(SequenceId sequence, std::span<const std::int32_t> tokens, std::int64_t position,
                          std::int64_t wanted, WantedRows what) const {
  const NoGrad no_grad(c);
  const auto size = static_cast<std::int64_t>(tokens.size());
  // The rows that are wanted come in one pass.
  const std::int64_t before = size - std::max<std::int64_t>(wanted, std::min(size, max_rows));
  PassRows told;
  for (std::int64_t done = 0; done < size;) {
    const std::int64_t n = rows_that_fit(
        sequence, done < before ? std::min(max_rows, before - done) : size - done, size - done - wanted);
    if (n == 0) {
      throw UserError(
          fmt::format("The cache ({} blocks of {}) holds no more than the {} tokens of this text.",
                      cache.pool().blocks(), cache.block(), position + done),
          "Give the cache more memory.");
    }
    if (whole != nullptr && size == 1 && wanted == 1) return add_whole(sequence, tokens[0], position, what);
    if (passes != nullptr && n == size && wanted > 0 && size <= ShortPasses::kMostRows) {
      const Tensor logits = passes->run(sequence, tokens, position, wanted);
      if (counts != nullptr) counts->rows += n;
      return tell(logits, what);
    }
    HostBatch host;
    host.batch = 1;
    host.seq = n;
    host.tokens.assign(tokens.begin() + done, tokens.begin() + done + n);
    host.positions.resize(static_cast<std::size_t>(n));
    std::iota(host.positions.begin(), host.positions.end(), static_cast<std::int32_t>(position + done));
    host.documents.assign(static_cast<std::size_t>(n), 0);
    const NewRows rows{sequence, n};
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
    told = tell(model.logits(c, ops::gather_rows(c, result.hidden, at)), what);
  }
  return told;
}

}  // namespace fathom
