// SIGTERM, SIGINT and SIGHUP (a closed terminal) ask a training to stop: the first sets a flag, which the
// trainer reads between micro-steps; a second one ends the process at once with status 128 + signal.
#pragma once

namespace fathom {

/// Installs the handlers and clears the flag; the destructor puts the previous handlers back. One at a time.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
};

/// Whether a signal has asked to stop since the handlers were installed.
bool stop_requested();
/// That signal's number, or 0.
int stop_signal();

}  // namespace fathom
