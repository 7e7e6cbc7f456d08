// A client of plain sockets, which can be as rude as a test needs.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace fathom::serve {

struct Response {
  int status = 0;                              // 0: the connection ended before an answer
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // of chunks: joined
  bool is_complete = false;

  nlohmann::json json() const { return nlohmann::json::parse(body, nullptr, false); }
  /// The JSON of each event of a stream but the [DONE] at its end, which has to be there.
  std::vector<nlohmann::json> events() const;
};

class Connection {
 public:
  explicit Connection(std::uint16_t port);
  ~Connection() { close(); }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  /// False when the server has closed.
  bool send(const std::string& bytes) const;
  /// One answer; gives up after `seconds`.
  Response read(double seconds = 60);
  /// At least one further byte, or "" at the end.
  std::string read_some(double seconds = 60) const;
  void close();
  /// Nothing more will be said; answers are still read.
  void close_sending() const;
  /// So that a close is a reset, and the system keeps about `little` bytes of what is sent. Of few it takes
  /// more only after pauses.
  void keep_little(int little = 4096) const;

 private:
  int socket_ = -1;
  std::string buffer_;
};

std::string request_text(const std::string& method, const std::string& path, const std::string& body = "",
                         const std::string& more_headers = "");
/// One request on a connection of its own.
Response get(std::uint16_t port, const std::string& path, const std::string& more_headers = "");
Response post(std::uint16_t port, const std::string& path, const nlohmann::json& body,
              const std::string& more_headers = "");

}  // namespace fathom::serve
