// Text on its way out in pieces: only whole characters pass.
#pragma once

#include <string>
#include <string_view>

namespace fathom::serve {

/// What passes in all is replace_invalid_utf8 (src/io/utf8.h) of what came in all, however it was cut.
class Utf8Gate {
 public:
  /// What is certain now: a character that has begun waits for its other bytes.
  std::string pass(std::string_view bytes);
  /// At the end: what waits will not be completed.
  std::string rest();

 private:
  std::string held_;
  bool in_run_ = false;  // of bytes that are no character, which become one U+FFFD together
};

}  // namespace fathom::serve
