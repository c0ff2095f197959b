/* A shim for LD_PRELOAD: bind() to the wildcard address becomes bind() to loopback. Servers that cannot be told what
 * address to listen on are then not reachable from the network.
 *
 *     cc -shared -fPIC -O2 -o bindlo.so bindlo.c -ldl
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

int bind(int fd, const struct sockaddr *addr, socklen_t len) {
	static int (*next)(int, const struct sockaddr *, socklen_t);
	if (!next) next = dlsym(RTLD_NEXT, "bind");
	if (addr && addr->sa_family == AF_INET && len >= sizeof(struct sockaddr_in)) {
		struct sockaddr_in v4;
		memcpy(&v4, addr, sizeof v4);
		if (v4.sin_addr.s_addr == htonl(INADDR_ANY)) {
			v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
			return next(fd, (struct sockaddr *)&v4, sizeof v4);
		}
	}
	if (addr && addr->sa_family == AF_INET6 && len >= sizeof(struct sockaddr_in6)) {
		struct sockaddr_in6 v6;
		memcpy(&v6, addr, sizeof v6);
		if (IN6_IS_ADDR_UNSPECIFIED(&v6.sin6_addr)) {
			inet_pton(AF_INET6, "::ffff:127.0.0.1", &v6.sin6_addr);
			return next(fd, (struct sockaddr *)&v6, sizeof v6);
		}
	}
	return next(fd, addr, len);
}
