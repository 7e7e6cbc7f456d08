// Progress of a long command on standard error: a live line on a terminal, a few plain lines in a pipe.
#pragma once

#include <cstdint>
#include <string>

#include "src/core/stopwatch.h"

namespace fathom::app {

class Progress {
 public:
  /// `what` names the work: "reading", "encoding".
  explicit Progress(std::string what);
  /// Ends the live line, if there is one.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// `details` follows the share done ("12,345 documents"). Cheap when called often.
  void update(std::int64_t done, std::int64_t total, const std::string& details);
  /// Is it time to show something? Lets the caller skip making `details`.
  bool due() const;

 private:
  std::string what_;
  bool terminal_;
  bool line_open_ = false;
  Stopwatch start_;
  Stopwatch shown_;
};

}  // namespace fathom::app
