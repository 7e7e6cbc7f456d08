// A model of its own as a draft, with a cache of its own that holds a streaming window: the first tokens and
// the latest, at their true places. Of a long prompt it reads no more than that.
#pragma once

#include <cstdint>
#include <vector>

#include "infer/speculate/gathered_level.h"

namespace fathom {

class WindowLevel final : public Level {
 public:
  /// `wants_sureness`: as of GatheredLevel.
  WindowLevel(const CachedModel& m, const RowRule& rule, bool wants_sureness, const Window& window);

  /// False: its cache is full.
  bool rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& rows) override;
  void settle(std::span<const std::int32_t> text) override;

 private:
  bool read(std::span<const std::int32_t> text, std::int64_t wanted, PassRows& told);
  std::int64_t held() const { return static_cast<std::int64_t>(ids_.size()) - left_out_; }
  void begin_anew();
  void move_window();

  CachedModel m_;
  const RowRule& rule_;
  bool wants_sureness_;
  Window window_;
  OwnSequence sequence_;
  std::vector<std::int32_t> ids_;  // of the text, that it went through or past
  std::size_t settled_ = 0;        // of them, how many do not change any more
  std::int64_t left_out_ = 0;      // tokens behind the first ones that are not in the window
};

}  // namespace fathom
