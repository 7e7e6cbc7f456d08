#include "infer/speculate/window_level.h"

#include <algorithm>

namespace fathom {

WindowLevel::WindowLevel(const CachedModel& m, const RowRule& rule, bool wants_sureness, const Window& window)
    : m_(m), rule_(rule), wants_sureness_(wants_sureness), window_(window), sequence_(m.cache) {}

// Goes on to the end of the text, from where it is the same.
bool WindowLevel::read(std::span<const std::int32_t> text, std::int64_t wanted, PassRows& told) {
  const std::size_t common =
      settled_ + common_prefix(std::span(ids_).subspan(settled_), text.subspan(settled_));
  const std::size_t kept =
      std::min(common, text.size() - static_cast<std::size_t>(std::max<std::int64_t>(wanted, 0)));
  if (kept < ids_.size()) {
    ids_.resize(kept);
    m_.cache.truncate(sequence_.id(), held());
  }
  std::span<const std::int32_t> more = text.subspan(kept);
  const auto n = static_cast<std::int64_t>(more.size());
  const NewRows rows{sequence_.id(), n};
  if (!m_.cache.fits({&rows, 1})) return false;
  told = m_.add(sequence_.id(), more, static_cast<std::int64_t>(kept), wanted, rule_.wanted(wants_sureness_));
  ids_.insert(ids_.end(), more.begin(), more.end());
  return true;
}

bool WindowLevel::rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& rows) {
  PassRows told;
  if (!read(text, proposed + 1, told)) return false;
  const auto count = static_cast<std::size_t>(proposed) + 1;
  return rule_.proposals(told, text, text.size() + 1 - count, count, wants_sureness_, rows);
}

void WindowLevel::settle(std::span<const std::int32_t> text) {
  const auto done = static_cast<std::int64_t>(text.size()) - 1;
  // However far others went on with the text, what is read of it is no more than the window.
  if (done - std::ssize(ids_) > window_.recent) begin_anew();
  if (ids_.empty() && done > 0) {  // the prompt: its first tokens, then its latest
    PassRows none;
    const std::int64_t sinks = std::min(window_.sinks, done);
    if (!read(text.first(static_cast<std::size_t>(sinks)), 0, none)) return;
    const std::int64_t first = std::max(sinks, done - window_.recent);
    left_out_ = first - sinks;
    ids_.assign(text.begin(), text.begin() + first);
    settled_ = ids_.size();
    read(text.first(static_cast<std::size_t>(done)), 0, none);
  }
  const std::size_t common =
      settled_ + common_prefix(std::span(ids_).subspan(settled_), text.subspan(settled_));
  settled_ = std::min(common, ids_.size());
  if (settled_ < ids_.size()) {
    ids_.resize(settled_);
    m_.cache.truncate(sequence_.id(), held());
  }
  if (held() > window_.sinks + 2 * window_.recent) move_window();
}

void WindowLevel::begin_anew() {
  sequence_ = OwnSequence(m_.cache);
  ids_.clear();
  settled_ = 0;
  left_out_ = 0;
}

void WindowLevel::move_window() {
  OwnSequence next(m_.cache);
  const std::int64_t held_now = held(), first = held_now - window_.recent;
  if (!m_.cache.has_room(next.id(), window_.sinks + window_.recent, window_.sinks + window_.recent)) return;
  m_.cache.append_tokens(m_.c, next.id(), sequence_.id(), 0, window_.sinks);
  m_.cache.append_tokens(m_.c, next.id(), sequence_.id(), first, held_now);
  left_out_ += first - window_.sinks;
  sequence_ = std::move(next);
}

}  // namespace fathom
