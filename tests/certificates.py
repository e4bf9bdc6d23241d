"""An authority of our own and the certificates that it signs, as files for TLS's tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """Its certificate is `ca`; those that it issues are for tramontane.test and 127.0.0.1."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder, self._name = folder, name
        self.ca = folder / f"{name}.pem"
        self._openssl("req", "-x509", *KEY, "-keyout", f"{name}.key", "-out", self.ca.name, "-subj", f"/CN={name}")

    def issue(self, name: str, *, days: int = 30) -> tuple[Path, Path]:
        """A certificate and its key, for a server or a client; with -1 `days` it expired yesterday."""
        (self.folder / "san").write_text("subjectAltName=DNS:tramontane.test,IP:127.0.0.1")
        self._openssl("req", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        days_of = ("-days", str(days))
        signed_by = ("-CA", self.ca.name, "-CAkey", f"{self._name}.key", "-CAcreateserial", "-extfile", "san")
        self._openssl("x509", "-req", "-in", f"{name}.csr", *signed_by, *days_of, "-out", f"{name}.pem")
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def rsa_key(self, path: Path) -> None:
        """A private key that is nobody's."""
        self._openssl("genrsa", "-out", str(path), "2048")

    def lock(self, key: Path, locked: Path) -> None:
        """The same key, behind a password."""
        self._openssl("pkcs8", "-topk8", "-in", str(key), "-out", str(locked), "-passout", "pass:sesame")

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)
