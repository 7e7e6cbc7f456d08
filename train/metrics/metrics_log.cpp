#include "train/metrics/metrics_log.h"

#include <cerrno>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <utility>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"

namespace fathom {
namespace {

struct Line {
  std::string_view text;  // without the newline
  AnyRecord record;
};

struct Lines {
  std::vector<Line> lines;
  bool torn_last_line = false;  // left out of `lines`
  bool no_final_newline = false;
};

std::string read_text(const std::filesystem::path& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    throw UserError("cannot read the metrics in " + path.string() + ": it is a folder, not a file.");
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) throw UserError("cannot read the metrics in " + path.string() + ": " + std::strerror(errno) + ".");
  std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  if (in.bad())
    throw UserError("cannot read the metrics in " + path.string() + ": " + std::strerror(errno) + ".");
  return text;
}

// The last line may be the torn one of a killed writer; every other line must be whole.
Lines split_lines(const std::string& text, const std::filesystem::path& path) {
  Lines out;
  std::string_view rest = text;
  for (std::int64_t number = 1; !rest.empty(); ++number) {
    const std::size_t end = rest.find('\n');
    const std::string_view line = rest.substr(0, end);
    const bool last = end == std::string_view::npos || end + 1 == rest.size();
    rest = end == std::string_view::npos ? std::string_view{} : rest.substr(end + 1);
    out.no_final_newline = end == std::string_view::npos;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    try {
      out.lines.push_back({line, parse_record(line)});
    } catch (const UserError& e) {
      if (!last) {
        throw UserError("bad metrics: line " + std::to_string(number) + " of " + path.string() +
                            " cannot be read: " + e.what(),
                        "Only the last line may be torn (by a killed training); remove or repair this one.");
      }
      out.torn_last_line = true;
    }
  }
  return out;
}

bool is_after(const AnyRecord& record, std::int64_t step) {
  if (const auto* s = std::get_if<StepRecord>(&record)) return s->step > step;
  if (const auto* e = std::get_if<EvalRecord>(&record)) return e->step > step;
  return false;
}

void drop_after(const std::filesystem::path& path, std::int64_t step) {
  const std::string text = read_text(path);
  const Lines all = split_lines(text, path);
  std::string kept;
  bool dropped = all.torn_last_line || all.no_final_newline;
  for (const Line& line : all.lines) {
    if (is_after(line.record, step)) {
      dropped = true;
    } else {
      kept.append(line.text).push_back('\n');
    }
  }
  if (dropped) write_file(path.string(), kept);
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  char text[32];
  gmtime_r(&now, &parts);
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

}  // namespace

MetricsLog::MetricsLog(std::filesystem::path path, std::int64_t step) : path_(std::move(path)) {
  std::error_code error;
  if (std::filesystem::exists(path_, error)) drop_after(path_, step);
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd_ < 0) {
    throw UserError("cannot open " + path_.string() + " for the run's metrics: " + std::strerror(errno) + ".",
                    "Check that the run folder exists and is writable.");
  }
}

MetricsLog::~MetricsLog() {
  if (fd_ >= 0) ::close(fd_);
}

MetricsLog::MetricsLog(MetricsLog&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}

void MetricsLog::append(const StepRecord& record) { append_line(to_json_line(record)); }
void MetricsLog::append(const EvalRecord& record) { append_line(to_json_line(record)); }

void MetricsLog::append(EventRecord record) {
  if (record.time.empty()) record.time = utc_now();
  append_line(to_json_line(record));
}

void MetricsLog::append_line(std::string line) {
  line.push_back('\n');
  struct stat before {};
  const bool known_size = ::fstat(fd_, &before) == 0;
  try {
    write_fully(fd_, line, path_.string());
  } catch (const UserError&) {
    // Half a line would stand in the way of the next one. If even this fails, the reader still copes with it.
    if (known_size && ::ftruncate(fd_, before.st_size) != 0) errno = 0;
    throw;
  }
}

void MetricsLog::sync() {
  if (::fsync(fd_) != 0 && errno != EINVAL && errno != EROFS) {
    throw UserError("cannot sync " + path_.string() + ": " + std::strerror(errno) + ".");
  }
}

Metrics read_metrics(const std::filesystem::path& path) {
  const std::string text = read_text(path);
  Lines all = split_lines(text, path);
  Metrics out;
  out.torn_last_line = all.torn_last_line;
  for (Line& line : all.lines) {
    if (auto* s = std::get_if<StepRecord>(&line.record)) {
      out.steps.push_back(std::move(*s));
    } else if (auto* e = std::get_if<EvalRecord>(&line.record)) {
      out.evals.push_back(std::move(*e));
    } else if (auto* event = std::get_if<EventRecord>(&line.record)) {
      out.events.push_back(std::move(*event));
    }
  }
  return out;
}

}  // namespace fathom
