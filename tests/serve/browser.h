// A headless Chromium that tests drive by its debugging protocol, over two pipes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include <nlohmann/json.hpp>
#include <sys/types.h>

namespace fathom::serve {

class Browser {
 public:
  /// The program: FATHOM_CHROMIUM's, or a chromium of PATH; "": there is none.
  static std::string program();

  /// Shows `url`. std::runtime_error: it does not begin, or later, does not answer.
  explicit Browser(const std::string& url);
  ~Browser();
  Browser(const Browser&) = delete;
  Browser& operator=(const Browser&) = delete;

  /// Of an expression, promises awaited. What it throws comes as a std::runtime_error.
  nlohmann::json evaluate(const std::string& expression);
  /// Asks until it is true; false: it did not become so.
  bool becomes(const std::string& expression, double seconds = 60);
  /// At the focus, as from a keyboard.
  void type(const std::string& text);
  /// "Enter", "Escape", ...; `modifiers`: 2 is Ctrl.
  void press(const std::string& key, int modifiers = 0);
  void prefer(const std::string& colour_scheme);  // "dark", "light"
  void resize(int width, int height);             // of the page, in CSS pixels
  std::string screenshot();                       // bytes of a PNG

 private:
  nlohmann::json call(const std::string& method, const nlohmann::json& params, bool of_page = true);
  std::string read_message();

  std::filesystem::path folder_;
  pid_t process_ = -1;
  int to_ = -1, from_ = -1;
  std::string buffer_, session_;
  std::int64_t next_ = 1;
};

}  // namespace fathom::serve
