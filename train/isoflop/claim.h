// Claims: a cell belongs to one worker at a time, on this machine or on another one that shares the folder.
//
// The lock is the kernel's (flock on NAME.lock), so a killed worker's claim is gone with it. Beside it stands
// NAME.owner, made with O_EXCL, with the owner's machine and process; a thread touches it while the claim is
// held. It tells `status` where a cell runs, and guards where flock does not reach across machines: a claim
// of another machine stands until it has not been touched for `stale_seconds`, by the file system's own
// clock.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

namespace fathom::isoflop {

struct ClaimTimes {
  double heartbeat_seconds = 15;  // between two touches
  double stale_seconds = 120;     // untouched for so long: its machine is gone
};

struct Owner {
  std::string machine;     // host name and boot id
  std::string text;        // for people: "host7, process 4711"
  double age_seconds = 0;  // since the last touch
};

/// This machine, as Owner::machine has it.
std::string this_machine();

class Claim {
 public:
  /// Nothing when another worker holds it. `base` is the path without ".lock" and ".owner"; its folder
  /// exists. UserError: the file system refuses, or knows no flock.
  static std::optional<Claim> take(const std::filesystem::path& base, const ClaimTimes& times = {});
  /// The same for what is held for a moment only: waits for its turn, up to a minute. UserError then.
  static Claim wait_for(const std::filesystem::path& base);
  /// Removes the owner's file and lets go of the lock.
  ~Claim();
  Claim(Claim&&) noexcept;
  Claim& operator=(Claim&&) = delete;

 private:
  struct Held;
  explicit Claim(std::unique_ptr<Held> held);
  std::unique_ptr<Held> held_;
};

/// Who holds the claim: nothing when it is free, or was left behind by a killed worker of this machine or a
/// machine that is gone.
std::optional<Owner> claimed_by(const std::filesystem::path& base, const ClaimTimes& times = {});

}  // namespace fathom::isoflop
