// Errors that cross every room. A user's mistake is a UserError; a bug in Fathom is an InternalError.
//
// No room below app/ ends the process: app/main.cpp turns a UserError into exit status 1 or 2 and one
// paragraph.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace fathom {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What the user gave cannot be used. The message is one clear paragraph: what, where, the value, what was
/// expected, and what to do about it.
class UserError : public Error {
 public:
  /// `message` says what is wrong and with which value; `hint` says what to do (may be empty).
  explicit UserError(const std::string& message, const std::string& hint = "")
      : Error(hint.empty() ? message : message + " " + hint) {}
};

/// There is not enough memory, of the machine or of a device, for what was asked.
class MemoryError : public UserError {
 public:
  using UserError::UserError;
};

/// The command line or the config was wrong: exit status 2 instead of 1.
class UsageError : public UserError {
 public:
  using UserError::UserError;
};

/// A broken invariant of Fathom itself, tagged with the op: "[rms_norm] x is [8, 16], w is [12]".
class InternalError : public Error {
 public:
  explicit InternalError(const std::string& message) : Error(message) {}
};

/// A fault after which the device answers this process with errors only, whatever it is asked; another
/// process may find it well.
class DeviceError : public InternalError {
 public:
  using InternalError::InternalError;
};

}  // namespace fathom
