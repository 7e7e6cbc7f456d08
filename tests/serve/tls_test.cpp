// The server through TLS, with a certificate that the test makes, and a client of OpenSSL's own.
#include <cstdio>

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernels/error.h"
#include "tests/io/temp.h"
#include "tests/serve/tiny_server.h"

namespace fathom::serve {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

template <class T, void (*kFree)(T*)>
struct Free {
  void operator()(T* p) const { kFree(p); }
};
using Key = std::unique_ptr<EVP_PKEY, Free<EVP_PKEY, EVP_PKEY_free>>;
using Certificate = std::unique_ptr<X509, Free<X509, X509_free>>;

/// A key, and a certificate of it for localhost that it signed itself, as two PEM files.
void make_certificate(const std::string& certificate_path, const std::string& key_path) {
  const Key key(EVP_EC_gen("P-256"));
  const Certificate certificate(X509_new());
  X509_set_version(certificate.get(), 2);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate.get()), 1);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), -60);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), 3600);
  X509_set_pubkey(certificate.get(), key.get());
  X509_NAME* name = X509_get_subject_name(certificate.get());
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>("localhost"),
                             -1, -1, 0);
  X509_set_issuer_name(certificate.get(), name);
  X509_sign(certificate.get(), key.get(), EVP_sha256());
  std::FILE* file = std::fopen(certificate_path.c_str(), "w");
  PEM_write_X509(file, certificate.get());
  std::fclose(file);
  file = std::fopen(key_path.c_str(), "w");
  PEM_write_PrivateKey(file, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
  std::fclose(file);
}

class TlsClient {
 public:
  TlsClient(std::uint16_t port, const std::string& trusted, int most = 0)
      : context_(SSL_CTX_new(TLS_client_method())),
        socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    SSL_CTX_set_verify(context_.get(), SSL_VERIFY_PEER, nullptr);
    SSL_CTX_load_verify_locations(context_.get(), trusted.c_str(), nullptr);
    SSL_CTX_set_max_proto_version(context_.get(), most);
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(port);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(socket_, reinterpret_cast<const sockaddr*>(&to), sizeof to), 0);
    ssl_.reset(SSL_new(context_.get()));
    SSL_set1_host(ssl_.get(), "localhost");
    SSL_set_fd(ssl_.get(), socket_);
    is_open_ = SSL_connect(ssl_.get()) == 1;
  }
  ~TlsClient() {
    if (socket_ >= 0) ::close(socket_);
  }

  bool is_open() const { return is_open_; }
  std::string version() const { return SSL_get_version(ssl_.get()); }
  void send(const std::string& text) { SSL_write(ssl_.get(), text.data(), static_cast<int>(text.size())); }
  std::string read_some() {
    std::string some(65536, '\0');
    const int n = SSL_read(ssl_.get(), some.data(), static_cast<int>(some.size()));
    some.resize(static_cast<std::size_t>(std::max(0, n)));
    return some;
  }
  /// Up to the server's end.
  std::string read_all() {
    std::string all;
    for (std::string some = read_some(); !some.empty(); some = read_some()) all += some;
    return all;
  }
  /// The server has said that this is all, and nobody else has cut it short.
  bool has_ended() const { return (SSL_get_shutdown(ssl_.get()) & SSL_RECEIVED_SHUTDOWN) != 0; }
  void say_the_end() { SSL_shutdown(ssl_.get()); }
  void close() {
    ::close(socket_);
    socket_ = -1;
  }

 private:
  std::unique_ptr<SSL_CTX, Free<SSL_CTX, SSL_CTX_free>> context_;
  std::unique_ptr<SSL, Free<SSL, SSL_free>> ssl_;
  int socket_;
  bool is_open_ = false;
};

class Tls : public ::testing::Test {
 protected:
  Tls() {
    make_certificate(certificate_, key_);
    options_.service.http.tls_certificate = certificate_;
    options_.service.http.tls_key = key_;
  }
  /// TinyServer's own client speaks no TLS.
  std::unique_ptr<TinyServer> open() {
    auto server = std::make_unique<TinyServer>(options_);
    server->open_unasked();
    for (int i = 0; i < 2000; ++i) {
      TlsClient c(server->port(), certificate_);
      c.send(request_text("GET", "/health", "", "Connection: close\r\n"));
      if (c.read_all().find(" 200 ") != std::string::npos) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return server;
  }
  std::string metrics(const TinyServer& server) {
    TlsClient c(server.port(), certificate_);
    c.send(request_text("GET", "/metrics", "", "Connection: close\r\n"));
    return c.read_all();
  }
  bool comes_to(const TinyServer& server, const std::string& line) {
    for (int i = 0; i < 2000; ++i) {
      if (metrics(server).find("\n" + line + "\n") != std::string::npos) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return false;
  }

  testing::TempFolder folder_;
  std::string certificate_ = folder_ / "cert.pem", key_ = folder_ / "key.pem";
  TinyOptions options_;
};

TEST_F(Tls, AnswersAsWithoutIt) {
  const auto server = open();
  EXPECT_EQ(server->service().url().substr(0, 8), "https://");
  const std::string body =
      json{{"prompt", "go"}, {"max_tokens", 200}, {"stream", true}, {"ignore_eos", true}}.dump();
  for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
    TlsClient c(server->port(), certificate_, version);
    ASSERT_TRUE(c.is_open());
    EXPECT_EQ(c.version(), version == TLS1_2_VERSION ? "TLSv1.2" : "TLSv1.3");
    // One connection, several requests, and two that come ahead.
    c.send(request_text("GET", "/version"));
    EXPECT_THAT(c.read_some(), HasSubstr("commit"));  // head and body are one write
    c.send(request_text("POST", "/v1/completions", body) +
           request_text("GET", "/health", "", "Connection: close\r\n"));
    const std::string all = c.read_all();
    EXPECT_THAT(all, HasSubstr("data: [DONE]"));
    EXPECT_THAT(all, HasSubstr("{\"status\":\"ok\"}"));
    EXPECT_TRUE(c.has_ended());
  }
  // Large answers and requests.
  TlsClient c(server->port(), certificate_);
  const std::string ids = json{{"tokens", std::vector<int>(300'000, 65)}}.dump();
  c.send(request_text("POST", "/detokenize", ids, "Connection: close\r\n"));
  EXPECT_THAT(c.read_all(), HasSubstr(std::string(300'000, 'A')));
}

TEST_F(Tls, WhatIsNoneOfItLeavesTheOthersAlone) {
  options_.service.http.header = std::chrono::milliseconds(200);
  const auto server = open();
  TlsClient old(server->port(), certificate_, TLS1_1_VERSION);
  EXPECT_FALSE(old.is_open());
  Connection plain(server->port());
  plain.send(request_text("GET", "/health"));
  EXPECT_EQ(plain.read_some().find("HTTP/"), std::string::npos);
  Connection silent(server->port());
  EXPECT_EQ(silent.read_some(10), "");  // a handshake has its time too
  EXPECT_THAT(metrics(*server), HasSubstr("fathom_build_info"));
}

TEST_F(Tls, LeavingIsNoticed) {
  options_.context = 8192;
  options_.cache_texts = 4;
  const auto server = open();
  int left = 0;
  for (const bool stream : {false, true}) {
    for (const bool says_so : {false, true}) {
      TlsClient c(server->port(), certificate_);
      const json body = {{"prompt", "go"}, {"max_tokens", 8000}, {"stream", stream}, {"ignore_eos", true}};
      c.send(request_text("POST", "/v1/completions", body.dump()));
      EXPECT_TRUE(comes_to(*server, "fathom_requests_running 1"));
      if (says_so) c.say_the_end();
      c.close();
      EXPECT_TRUE(comes_to(*server, "fathom_requests_cancelled_total " + std::to_string(++left)));
    }
  }
  server->stop();
  EXPECT_EQ(server->stats().free_blocks, server->stats().blocks);
}

TEST_F(Tls, FilesThatAreNoneAreRefused) {
  const auto refused = [&](const std::string& certificate, const std::string& key, const std::string& words) {
    HttpOptions o = options_.service.http;
    o.tls_certificate = certificate;
    o.tls_key = key;
    ServiceOptions service;
    service.http = o;
    service.http.port = 0;
    try {
      const Service made(service);
      ADD_FAILURE() << certificate << " and " << key << " were taken";
    } catch (const UserError& e) {
      EXPECT_THAT(e.what(), HasSubstr(words));
    }
  };
  refused(certificate_, "", "--tls-key");
  refused(folder_ / "nowhere.pem", key_, "nowhere.pem");
  refused(certificate_, folder_ / "nowhere.pem", "--tls-key");
  refused(key_, key_, "--tls-cert");
  make_certificate(folder_ / "other.pem", folder_ / "other_key.pem");
  refused(certificate_, folder_ / "other_key.pem", "other_key.pem");
}

}  // namespace
}  // namespace fathom::serve
