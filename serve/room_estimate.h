// How long until there is room again, for those who are refused because there is none.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>

#include "serve/job.h"

namespace fathom::serve {

/// From how fast the last texts came to their end. Not for several threads at once.
class RoomEstimate {
 public:
  /// There is work again, after none.
  void began(Clock::time_point now);
  /// One more text is over, whatever had come of it.
  void ended(Clock::time_point now);
  /// Whole seconds until `texts` more of them are over: 1 to kMost. One that has not ended yet counts as one
  /// that does now, so that nothing is promised at the beginning.
  int seconds_until(std::int64_t texts, Clock::time_point now) const;

  static constexpr int kMost = 60;

 private:
  static constexpr std::size_t kRemembered = 256;
  Clock::time_point since_{};           // the time before the first of
  std::deque<Clock::time_point> ends_;  // the last ones
};

}  // namespace fathom::serve
