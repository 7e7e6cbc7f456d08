#include "infer/speculate/target_level.h"

#include <algorithm>
#include <cmath>

namespace fathom {

TargetLevel::TargetLevel(const CachedModel& m, const RowRule& rule, Sequence whose) : m_(m), rule_(rule) {
  if (whose == Sequence::Borrowed) return;
  own_ = OwnSequence(m_.cache);
  sequence_ = own_.id();
  m_.cache.watch(sequence_);
}

void TargetLevel::borrow(SequenceId sequence, std::span<const std::int32_t> text, bool watches) {
  sequence_ = sequence;
  ids_.assign(text.begin(), text.end() - 1);
  settled_ = ids_.size();
  if (watches) m_.cache.watch(sequence_);
}

void TargetLevel::keep(std::int64_t tokens) {
  if (tokens == static_cast<std::int64_t>(ids_.size())) return;
  m_.cache.truncate(sequence_, tokens);
  ids_.resize(static_cast<std::size_t>(tokens));
}

void TargetLevel::read(std::span<const std::int32_t> text) {
  const std::span<const std::int32_t> all = text.first(text.size() - 1);
  m_.add(sequence_, all.subspan(ids_.size()), static_cast<std::int64_t>(ids_.size()), 0);
  ids_.assign(all.begin(), all.end());
}

void TargetLevel::assume(std::span<const std::int32_t> text, double kept) {
  const std::span<const std::int32_t> all = text.first(text.size() - 1);
  const auto tokens = std::ssize(all);
  m_.cache.assume(sequence_, tokens,
                  static_cast<std::int64_t>(std::llround(kept * static_cast<double>(tokens))));
  ids_.assign(all.begin(), all.end());
}

bool TargetLevel::rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& rows) {
  const std::size_t first = text.size() - 1 - static_cast<std::size_t>(proposed);
  const std::size_t common =
      settled_ + common_prefix(std::span(ids_).subspan(settled_), text.subspan(settled_));
  keep(static_cast<std::int64_t>(std::min(common, first)));
  PassRows told = m_.add(sequence_, text.subspan(ids_.size()), static_cast<std::int64_t>(ids_.size()),
                         proposed + 1, wants_logits_ ? Wanted::Logits : rule_.wanted(false));
  ids_.insert(ids_.end(), text.begin() + static_cast<std::ptrdiff_t>(ids_.size()), text.end());
  rule_.add_rows(told, text, first + 1, static_cast<std::size_t>(proposed) + 1, false, rows);
  // Rows that lie on a device stay no longer than whoever asks for them.
  if (wants_logits_) told_ = std::move(told);
  return true;
}

void TargetLevel::settle(std::span<const std::int32_t> text) {
  const std::size_t common =
      settled_ + common_prefix(std::span(ids_).subspan(settled_), text.subspan(settled_));
  settled_ = std::min(common, text.size() - 1);
  keep(static_cast<std::int64_t>(settled_));
}

}  // namespace fathom
