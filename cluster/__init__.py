"""Where it runs and where it is kept: Ray, object storage, versions, leases. The only package that imports Ray."""
