// A line of JSON for each request that was answered, or left.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>

#include "serve/http/exchange.h"

namespace fathom::serve {

/// One request's line, without its end: time, peer, method, path, status, bytes, seconds; id, prompt_tokens
/// and completion_tokens of completions; verifications and tokens_per_verification, where speculation wrote
/// some of them; end, where it did not end well.
std::string access_line(const std::string& time, const HttpRequest& request, const AnswerRecord& record,
                        int status, std::int64_t bytes, double seconds);

/// Any thread. A line that cannot be written is lost, and the server goes on.
class AccessLog {
 public:
  /// `path` is appended to; "-": standard error. UserError: it cannot be opened.
  explicit AccessLog(const std::string& path);
  void add(const HttpRequest& request, const AnswerRecord& record, int status, std::int64_t bytes,
           double seconds);

 private:
  struct Close {
    void operator()(std::FILE* file) const;
  };
  std::mutex mutex_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace fathom::serve
