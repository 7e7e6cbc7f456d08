#include "infer/speculate/row_rule.h"

#include <algorithm>
#include <cmath>
#include <exception>

#include "infer/logit_scan.h"
#include "infer/pieces.h"
#include "infer/speculate/chance.h"
#include "kernels/error.h"

namespace fathom {

WantedRows RowRule::wanted(bool wants_sureness) const {
  if (!chooses() && sampling_.temperature_alone()) return {Wanted::Shares, sampling_.temperature};
  if (sampling_.temperature > 0 || sampling_.penalises() || !sampling_.logit_bias.empty())
    return Wanted::Logits;
  return wants_sureness ? Wanted::LikeliestAndShare : Wanted::Likeliest;
}

Row RowRule::row(const PassRows& told, std::size_t i, std::size_t count, std::span<const std::int32_t> text,
                 bool wants_sureness) const {
  if (told.shares != nullptr) {
    Row row;
    row.held = told.shares;
    row.number = i;
    return row;
  }
  if (!told.choices.empty()) return {.p = {}, .only = told.choices[i].id, .sure = told.choices[i].share};
  const std::size_t vocab = told.logits.size() / count;
  return of_logits(std::span(told.logits).subspan(i * vocab, vocab), text, wants_sureness);
}

Row RowRule::of_logits(std::span<const float> logits, std::span<const std::int32_t> text,
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

void RowRule::add_rows(const PassRows& told, std::span<const std::int32_t> text, std::size_t first,
                       std::size_t count, bool wants_sureness, std::vector<Row>& rows) const {
  const std::size_t before = rows.size();
  rows.resize(before + count);
  std::vector<std::exception_ptr> errors(count);
  for_pieces(static_cast<std::int64_t>(count), 1, [&](std::int64_t begin, std::int64_t end) {
    for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
      try {
        rows[before + i] = row(told, i, count, text.first(first + i), wants_sureness);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    }
  });
  for (const std::exception_ptr& e : errors) {
    if (e) std::rethrow_exception(e);
  }
}

bool RowRule::proposals(const PassRows& told, std::span<const std::int32_t> text, std::size_t first,
                        std::size_t count, bool wants_sureness, std::vector<Row>& rows) const {
  try {
    add_rows(told, text, first, count, wants_sureness, rows);
  } catch (const UserError&) {
    rows.clear();
  }
  return !rows.empty();
}

Row RowRule::certainly(std::int32_t id, double sure) const {
  Row row;
  row.sure = sure;
  (chooses() ? row.only : row.certain) = id;
  return row;
}

}  // namespace fathom
