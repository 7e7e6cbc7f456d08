#include "serve/room_estimate.h"

#include <algorithm>
#include <cmath>

namespace fathom::serve {

void RoomEstimate::began(Clock::time_point now) {
  since_ = now;
  ends_.clear();
}

void RoomEstimate::ended(Clock::time_point now) {
  ends_.push_back(now);
  if (ends_.size() <= kRemembered) return;
  since_ = ends_.front();
  ends_.pop_front();
}

int RoomEstimate::seconds_until(std::int64_t texts, Clock::time_point now) const {
  const double passed = std::chrono::duration<double>(now - since_).count();
  const double each = passed / static_cast<double>(ends_.size() + 1);
  return static_cast<int>(std::clamp(std::ceil(each * static_cast<double>(texts)), 1.0, double{kMost}));
}

}  // namespace fathom::serve
