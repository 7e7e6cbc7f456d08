#include "serve/http/tls.h"

#include <fmt/format.h>
#include <openssl/ssl.h>

#include "kernels/error.h"

namespace fathom::serve {

namespace ssl = boost::asio::ssl;
using boost::system::error_code;

std::unique_ptr<ssl::context> tls_context(const std::string& certificate, const std::string& key) {
  if (certificate.empty() && key.empty()) return nullptr;
  if (certificate.empty() || key.empty())
    throw UsageError("TLS needs a certificate and its key.", "Give --tls-cert FILE and --tls-key FILE.");
  auto context = std::make_unique<ssl::context>(ssl::context::tls_server);
  error_code e;
  context->set_options(ssl::context::default_workarounds | ssl::context::no_sslv2 | ssl::context::no_sslv3 |
                           ssl::context::no_tlsv1 | ssl::context::no_tlsv1_1 | ssl::context::no_compression |
                           SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE,
                       e);
  // An idle connection then holds no buffers.
  SSL_CTX_set_mode(context->native_handle(), SSL_MODE_RELEASE_BUFFERS);
  // A server has nobody to ask.
  context->set_password_callback([](std::size_t, ssl::context::password_purpose) { return std::string(); },
                                 e);
  context->use_certificate_chain_file(certificate, e);
  if (e)
    throw UserError(fmt::format("--tls-cert {} cannot be used: {}.", certificate, e.message()),
                    "It is a file of certificates in PEM, the server's own first.");
  context->use_private_key_file(key, ssl::context::pem, e);
  if (e)
    throw UserError(fmt::format("--tls-key {} cannot be used: {}.", key, e.message()),
                    "It is the key of --tls-cert's first certificate, in PEM and without a passphrase.");
  return context;
}

}  // namespace fathom::serve
