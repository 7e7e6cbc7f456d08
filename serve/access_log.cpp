#include "serve/access_log.h"

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <ctime>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"

namespace fathom::serve {

namespace {

std::string now_in_utc() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto ms =
      std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm parts{};
  ::gmtime_r(&seconds, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &parts);
  return fmt::format("{}.{:03}Z", text, ms);
}

}  // namespace

std::string access_line(const std::string& time, const HttpRequest& request, const AnswerRecord& record,
                        int status, std::int64_t bytes, double seconds) {
  nlohmann::ordered_json line = {{"time", time},
                                 {"peer", request.peer},
                                 {"method", request.method},
                                 {"path", request.path},
                                 {"status", status},
                                 {"bytes", bytes},
                                 {"seconds", std::round(seconds * 1e6) / 1e6}};
  if (!record.id.empty()) line["id"] = record.id;
  if (record.prompt_tokens >= 0) line["prompt_tokens"] = record.prompt_tokens;
  if (record.completion_tokens >= 0) line["completion_tokens"] = record.completion_tokens;
  if (record.verifications > 0) {
    line["verifications"] = record.verifications;
    line["tokens_per_verification"] = std::round(100 * static_cast<double>(record.verified_tokens) /
                                                 static_cast<double>(record.verifications)) /
                                      100;
  }
  if (!record.end.empty()) line["end"] = record.end;
  return line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

void AccessLog::Close::operator()(std::FILE* file) const {
  if (file != stderr) std::fclose(file);
}

AccessLog::AccessLog(const std::string& path) : file_(path == "-" ? stderr : std::fopen(path.c_str(), "ae")) {
  if (!file_)
    throw UserError(fmt::format("Cannot write the access log {}: {}.", path, std::strerror(errno)),
                    "Give another path, or - for standard error.");
}

void AccessLog::add(const HttpRequest& request, const AnswerRecord& record, int status, std::int64_t bytes,
                    double seconds) {
  const std::string line = access_line(now_in_utc(), request, record, status, bytes, seconds) + "\n";
  const std::lock_guard lock(mutex_);
  std::fwrite(line.data(), 1, line.size(), file_.get());
  std::fflush(file_.get());
}

}  // namespace fathom::serve
