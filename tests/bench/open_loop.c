/* An open loop that takes little processor time: two processors of a virtual machine are often halves of one core, and what the generator takes slows the server.
   open_loop PORT CONNECTIONS TIMEOUT_S DUE REQUESTS FOUND
   DUE: doubles, seconds from the start, rising. REQUESTS: each a 32-bit length and the bytes of a whole HTTP/1.1 request, sent in turn.
   FOUND: for each that was due four doubles: due, milliseconds from due to answer, status (0: no answer), milliseconds that it was sent late. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define ROOM (1 << 20)

struct connection { int fd, busy; double due, late; size_t held, whole; char *read; };

static double *due; static size_t requests, coming, answered;
static char **body; static uint32_t *length; static size_t bodies;
static struct connection *all; static int connections, idle_count, *idle, port, ready;
static double began; static FILE *found;

static void fail(const char *what) { fprintf(stderr, "%s: %s\n", what, strerror(errno)); exit(1); }

static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec - began; }

static void *content(const char *file, size_t *size) {
    FILE *f = fopen(file, "rb"); if (!f) fail(file);
    fseek(f, 0, SEEK_END); *size = ftell(f); rewind(f);
    char *all_of_it = malloc(*size + 1);
    if (!all_of_it || fread(all_of_it, 1, *size, f) != *size) fail(file);
    fclose(f);
    return all_of_it;
}

static void connect_to(struct connection *c) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0) fail("socket");
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to)) { close(c->fd); c->fd = -1; return; }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(ready, EPOLL_CTL_ADD, c->fd, &event)) fail("epoll_ctl");
}

static void note(double at, double late, int status) {
    double row[4] = {at, 1000 * (now() - at), status, late};
    if (fwrite(row, sizeof row, 1, found) != 1) fail("found");
    answered++;
}

static void drop(struct connection *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1; c->held = c->whole = 0;
    if (c->busy) { c->busy = 0; note(c->due, c->late, 0); idle[idle_count++] = c - all; }
}

static void send_one(double at) {
    struct connection *c = &all[idle[--idle_count]];
    size_t which = coming % bodies, sent = 0;
    c->busy = 1; c->due = at; c->late = 1000 * (now() - at); c->held = c->whole = 0;
    if (c->fd < 0) connect_to(c);
    while (c->fd >= 0 && sent < length[which]) {
        ssize_t n = send(c->fd, body[which] + sent, length[which] - sent, MSG_NOSIGNAL);
        if (n >= 0) sent += n;
        else if (errno != EAGAIN) break;
    }
    if (sent < length[which]) drop(c);
}

static void read_some(struct connection *c) {
    ssize_t n = recv(c->fd, c->read + c->held, ROOM - 1 - c->held, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) { drop(c); return; }
    c->held += n;
    c->read[c->held] = 0;
    char *end = strstr(c->read, "\r\n\r\n");
    if (!end) return;
    if (!c->whole) {
        char *told = strcasestr(c->read, "\r\ncontent-length:");
        if (told && told < end) c->whole = end + 4 - c->read + strtoul(told + 17, NULL, 10);
        else if (c->held >= 5 && !memcmp(c->read + c->held - 5, "0\r\n\r\n", 5)) c->whole = c->held;     /* chunked */
        else return;
        if (c->whole >= ROOM) { errno = EMSGSIZE; fail("answer"); }
    }
    if (c->held < c->whole) return;
    c->busy = 0;
    note(c->due, c->late, atoi(c->read + 9));
    char *last = strcasestr(c->read, "\r\nconnection: close");
    if (last && last < end) drop(c);
    idle[idle_count++] = c - all;
}

int main(int argc, char **argv) {
    if (argc != 7) { fprintf(stderr, "open_loop PORT CONNECTIONS TIMEOUT_S DUE REQUESTS FOUND\n"); return 2; }
    size_t size; double timeout = atof(argv[3]), checked = 0;
    port = atoi(argv[1]); connections = atoi(argv[2]);
    due = content(argv[4], &size); requests = size / sizeof(double);
    char *told = content(argv[5], &size);
    for (char *at = told; at < told + size; at += 4 + length[bodies++]) {
        body = realloc(body, (bodies + 1) * sizeof *body); length = realloc(length, (bodies + 1) * sizeof *length);
        memcpy(&length[bodies], at, 4); body[bodies] = at + 4;
    }
    if (!(found = fopen(argv[6], "wb")) || setvbuf(found, NULL, _IOFBF, 32 * requests + 1)) fail(argv[6]);     /* written at the end */
    prctl(PR_SET_TIMERSLACK, 1);
    ready = epoll_create1(0); all = calloc(connections, sizeof *all); idle = calloc(connections, sizeof *idle);
    for (int i = 0; i < connections; i++) { all[i].read = malloc(ROOM); connect_to(&all[i]); idle[idle_count++] = i; }
    usleep(50000);     /* all of them are taken before the first request */
    began = 0; began = now();
    while (answered < requests) {
        double at = now(), wait = 0.1;
        while (coming < requests && due[coming] <= at && idle_count) { send_one(due[coming]); coming++; }
        if (coming < requests && idle_count && due[coming] - now() < wait) wait = due[coming] - now();
        struct timespec rest = {0, wait > 0 ? (long)(wait * 1e9) : 0};
        struct epoll_event events[256];
        int n = epoll_pwait2(ready, events, 256, &rest, NULL);
        if (n < 0 && errno != EINTR) fail("epoll");
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->busy) read_some(c);
            else { close(c->fd); c->fd = -1; }     /* closed while nobody asked */
        }
        if (now() > checked + 1) {
            checked = now();
            for (int i = 0; i < connections; i++) if (all[i].busy && checked - all[i].due > timeout) drop(&all[i]);
        }
    }
    return fclose(found) ? 1 : 0;
}
