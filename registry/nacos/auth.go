package nacos

import (
	"context"
	"crypto/hmac"
	"crypto/sha1" //nolint:gosec // what Nacos verifies
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/regbridge/regbridge/registry"
)

// errRefused is wrapped by errors about credentials that the server does not accept: another server will not either.
// errUnclear wraps it where the server's answer can also mean that it can log in nobody.
var (
	errRefused = errors.New("the server refuses our credentials")
	errUnclear = fmt.Errorf("%w, or can log in nobody", errRefused)
)

// final reports whether another server would give the same error.
func final(err error) bool { return errors.Is(err, errRefused) && !errors.Is(err, errUnclear) }

const (
	// renewPause is the time between two attempts to renew a login that is still good.
	renewPause = time.Minute
	// loginPause is the time for which a failed login stands for all that wait for one.
	loginPause = time.Second
)

// tokenHeader carries the token of a login in gRPC requests.
const tokenHeader = "accessToken"

// auth keeps the token of a login at one server, and signs requests where the entry has keys for that.
type auth struct {
	api *api

	mu     sync.Mutex
	token  string
	failed error     // why there is no token
	renew  time.Time // no login is tried before
}

// retry calls request with the headers that authorise it. If the server refuses them it logs in again, and calls it once
// more. k is what the request is about.
func (a *auth) retry(ctx context.Context, k key, request func(headers map[string]string) error) error {
	for again := false; ; again = true {
		headers, err := a.headers(ctx, k)
		if err != nil {
			return err
		}
		err = request(headers)
		refused, ok := errors.AsType[*answerError](err)
		if !ok || refused.code != http.StatusForbidden && refused.code != http.StatusUnauthorized {
			return err
		}
		switch {
		case len(headers) == 0:
			return fmt.Errorf("%w: it needs credentials (%d %s), and the entry has none: name a Secret in authSecretName",
				errRefused, refused.code, refused.message)
		case again || headers[tokenHeader] == "":
			return fmt.Errorf("%w: %w", errRefused, err)
		}
		a.forget(headers[tokenHeader])
	}
}

func (a *auth) forget(token string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.token == token {
		a.token, a.renew = "", time.Time{}
	}
}

// headers returns what authorises a request about a service, or with an empty name about a group.
func (a *auth) headers(ctx context.Context, k key) (map[string]string, error) {
	var secret registry.Credentials
	if a.api.env.Credentials != nil {
		var err error
		if secret, err = a.api.env.Credentials(); err != nil {
			return nil, err
		}
	}
	headers := map[string]string{}
	accessKey, secretKey := a.api.accessKey, a.api.secretKey
	if in := secret.First("nacosAccessKey", "accessKey"); in != "" {
		accessKey, secretKey = in.Reveal(), secret.First("nacosSecretKey", "secretKey")
	}
	if accessKey != "" && secretKey != "" {
		sign(headers, accessKey, secretKey, k, time.Now())
	}
	user, password := secret.First("nacosUsername", "username"), secret.First("nacosPassword", "password")
	switch {
	case user != "" && password == "":
		return nil, fmt.Errorf("%w: secret %s has a user name and no nacosPassword", errRefused, a.api.secret)
	case user != "":
	case a.api.secret != "" && accessKey == "": // else it would be read as nobody, who may see less
		return nil, fmt.Errorf("%w: secret %s has neither nacosUsername and nacosPassword nor nacosAccessKey and nacosSecretKey",
			errRefused, a.api.secret)
	default:
		return headers, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Now().After(a.renew) {
		switch err := a.login(ctx, user, password); {
		case err != nil && ctx.Err() != nil:
			return nil, err
		case err != nil && a.token == "":
			a.failed, a.renew = fmt.Errorf("log in: %w", err), time.Now().Add(loginPause)
		case err != nil: // the server takes the old token for as long as it says
			a.renew = time.Now().Add(renewPause)
			a.api.env.Logger.Warn("the login at Nacos cannot be renewed; the old one is used until it is over",
				"server", a.api.server.String(), "error", err)
		}
	}
	if a.token == "" {
		return nil, a.failed
	}
	headers[tokenHeader] = a.token
	return headers, nil
}

// login gets a new token. a.mu is held, so that many requests log in once.
func (a *auth) login(ctx context.Context, user, password registry.Secret) error {
	form := url.Values{"username": {user.Reveal()}, "password": {password.Reveal()}}.Encode()
	secrets := []string{user.Reveal(), password.Reveal(), url.QueryEscape(user.Reveal()), url.QueryEscape(password.Reveal())}
	var missing error
	// 1.2 and later, 3.x with its old paths switched off, and what is older than 1.2.
	for _, path := range []string{"/v1/auth/users/login", "/v3/auth/user/login", "/v1/auth/login"} {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.api.base.JoinPath(path).String(), strings.NewReader(form))
		if err != nil {
			return withoutURL(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		var answer struct {
			AccessToken string `json:"accessToken"`
			TokenTTL    int64  `json:"tokenTtl"` // in seconds
		}
		err = a.api.do(req, "login", &answer, secrets...)
		if refused, ok := errors.AsType[*answerError](err); ok {
			switch refused.code {
			case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusGone:
				missing = fmt.Errorf("no login is known at this server: %w", refused)
				continue
			case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden:
				return fmt.Errorf("%w: %w", errRefused, refused)
			case http.StatusInternalServerError: // a wrong password in 3.x, an unknown user in 2.x
				return fmt.Errorf("%w: check the entry's Secret, keys nacosUsername and nacosPassword: %w", errUnclear, refused)
			}
		}
		if err != nil {
			return err
		}
		if answer.AccessToken == "" {
			return errors.New("the answer has no token in it")
		}
		a.token = answer.AccessToken
		// At most an hour: a server that was restarted with another key refuses tokens that are not over.
		life := int64(3600)
		if answer.TokenTTL > 0 {
			life = min(life, answer.TokenTTL)
		}
		a.renew = time.Now().Add(time.Duration(life) * time.Second * 4 / 5)
		return nil
	}
	return missing
}

// sign adds the headers by which Alibaba Cloud's Nacos (MSE) recognises an access key: the HMAC-SHA1 of the time in
// milliseconds and the service, https://help.aliyun.com/zh/mse; the form is that of Nacos's own clients.
func sign(headers map[string]string, accessKey string, secretKey registry.Secret, k key, now time.Time) {
	data := strconv.FormatInt(now.UnixMilli(), 10)
	if k.name != "" {
		data += "@@" + k.id()
	}
	mac := hmac.New(sha1.New, []byte(secretKey.Reveal()))
	mac.Write([]byte(data))
	headers["ak"], headers["data"] = accessKey, data
	headers["signature"] = base64.StdEncoding.EncodeToString(mac.Sum(nil))
}
