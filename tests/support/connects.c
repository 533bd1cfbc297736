/* Notes the internet addresses of every connect, bind and sendto, one a line, in the file that LD_CONNECTS names. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *call, const struct sockaddr *address) {
    const char *path = getenv("LD_CONNECTS");
    char host[64] = "", line[160];
    int port = 0, kept = errno;
    if (!path || !address) return;
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const void *)address;
        inet_ntop(AF_INET, &in->sin_addr, host, sizeof host), port = ntohs(in->sin_port);
    } else if (address->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in = (const void *)address;
        inet_ntop(AF_INET6, &in->sin6_addr, host, sizeof host), port = ntohs(in->sin6_port);
    } else return;
    int length = snprintf(line, sizeof line, "%s %s %d %d\n", call, host, port, getpid());
    int file = open(path, O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (file >= 0) { if (write(file, line, length)) {} close(file); }
    errno = kept;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int connect(int fd, const struct sockaddr *address, socklen_t length) {
    note("connect", address);
    return REAL(connect)(fd, address, length);
}

int bind(int fd, const struct sockaddr *address, socklen_t length) {
    note("bind", address);
    return REAL(bind)(fd, address, length);
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length) {
    note("sendto", address);
    return REAL(sendto)(fd, data, size, flags, address, length);
}
