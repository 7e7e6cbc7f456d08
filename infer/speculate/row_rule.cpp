#include "infer/speculate/row_rule.h"

#include <algorithm>
#include <cmath>

#include "infer/logit_scan.h"
#include "infer/speculate/chance.h"
#include "kernels/error.h"

namespace fathom {

Row RowRule::row(std::span<const float> logits, std::span<const std::int32_t> text,
                 bool wants_sureness) const {
  const auto prompt = static_cast<std::size_t>(prompt_);
  const TokenHistory history{text.first(prompt), text.subspan(prompt)};
  Row row;
  if (sampling_.temperature <= 0) {
    row.only = sample(logits, sampling_, text.size(), history, false).id;
    row.sure = wants_sureness ? rough_share(logits, row.only) : 1;
    return row;
  }
  probabilities(logits, sampling_, text.size(), history, row.p);
  if (!chooses()) return row;
  row.only = gumbel_choice(row.p, sampling_.seed, static_cast<std::int64_t>(text.size()));
  row.sure = row.p[static_cast<std::size_t>(row.only)];
  row.p.clear();
  return row;
}

bool RowRule::proposals(std::span<const float> logits, std::span<const std::int32_t> text, std::size_t first,
                        std::size_t count, bool wants_sureness, std::vector<Row>& rows) const {
  const std::size_t vocab = logits.size() / count;
  try {
    for (std::size_t i = 0; i < count; ++i)
      rows.push_back(row(logits.subspan(i * vocab, vocab), text.first(first + i), wants_sureness));
  } catch (const UserError&) {
    rows.clear();
  }
  return !rows.empty();
}

Row RowRule::certainly(std::int32_t id, std::int64_t vocab, double sure) const {
  Row row;
  row.sure = sure;
  if (chooses()) {
    row.only = id;
  } else {
    row.p.assign(static_cast<std::size_t>(vocab), 0.0);
    row.p[static_cast<std::size_t>(id)] = 1;
  }
  return row;
}

}  // namespace fathom
