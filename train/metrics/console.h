// What a person sees while a model trains: one live line on a terminal, few plain lines in a pipe.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <ostream>
#include <string>

#include "train/metrics/record.h"

namespace fathom {

enum class ConsoleKind { Terminal, Pipe };

struct ConsoleOptions {
  ConsoleKind kind = ConsoleKind::Pipe;
  std::int64_t total_steps = 0;        // the horizon
  std::function<int()> width = {};     // columns of the terminal; empty: 100
  std::function<double()> clock = {};  // seconds, monotone; empty: the steady clock
  double every_seconds = 30.0;         // in a pipe: a line at least this often ...
  double every_share = 0.1;            // ... and at every such share of the steps
};

class Console {
 public:
  Console(std::ostream& out, ConsoleOptions options);

  void step(const StepRecord& record);
  void evaluation(const EvalRecord& record);
  void event(const EventRecord& record);
  /// A line of its own, above the live one.
  void message(const std::string& text);
  /// Ends the live line; the cursor is at the start of a new one.
  void finish();

 private:
  std::ostream& out_;
  ConsoleOptions options_;
  bool live_ = false;  // a live line stands unfinished
  std::optional<double> last_seconds_;
  std::int64_t last_share_ = -1;
};

/// Whether a file descriptor is a terminal, and its width in columns (100 when unknown).
ConsoleKind console_kind(int fd);
int terminal_width(int fd);

// Formatting, pure.
std::string format_step(const StepRecord& record, std::int64_t total_steps);
/// Briefer, for a terminal: the fields that fit into `width` columns, whole, the most important first.
std::string format_live_step(const StepRecord& record, std::int64_t total_steps, int width);
std::string format_evaluation(const EvalRecord& record);
std::string format_event(const EventRecord& record);
/// Cut to `width` columns, with an ellipsis; counts UTF-8 characters, never splits one.
std::string cut_to_width(const std::string& text, int width);

}  // namespace fathom
