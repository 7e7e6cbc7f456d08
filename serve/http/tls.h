// The server's end of TLS.
#pragma once

#include <memory>
#include <string>

#include <boost/asio/ssl/context.hpp>

namespace fathom::serve {

/// TLS 1.2 and 1.3 with the certificates of `certificate` (PEM: the server's, then those that signed it) and
/// the key of `key` (PEM, without a passphrase). Null: both are empty. UsageError: one is. UserError: a file
/// cannot be read or is no such thing, or the key is another certificate's.
std::unique_ptr<boost::asio::ssl::context> tls_context(const std::string& certificate,
                                                       const std::string& key);

}  // namespace fathom::serve
