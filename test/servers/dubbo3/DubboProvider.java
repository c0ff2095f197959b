package regbridge;

import demo.api.Greeter;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.apache.dubbo.config.ApplicationConfig;
import org.apache.dubbo.config.ProtocolConfig;
import org.apache.dubbo.config.RegistryConfig;
import org.apache.dubbo.config.ServiceConfig;
import org.apache.dubbo.config.bootstrap.DubboBootstrap;

/** Provides services and registers them in ZooKeeper. The system properties that say how are those read below. */
public final class DubboProvider {
    /** The service of providers with two=true; such a nested interface has a $ in its name. */
    public interface Stock {
        int count(String article);
    }

    // A class: for a lambda there would be no page under the protocol tri.
    public static final class GreeterService implements Greeter {
        @Override
        public String greet(String name) {
            return System.getProperty("id") + " greets " + name;
        }
    }

    public static final class StockService implements Stock {
        @Override
        public int count(String article) {
            return article.length();
        }
    }

    public static void main(String[] args) throws Exception {
        ApplicationConfig application = new ApplicationConfig(System.getProperty("app"));
        application.setRegisterMode(System.getProperty("mode"));
        application.setMetadataType(System.getProperty("metadata"));
        application.setQosEnable(false); // would listen on all addresses
        application.setEnableFileCache(false);

        RegistryConfig registry = new RegistryConfig(System.getProperty("registry"));
        registry.setTimeout(30_000); // of connecting, on a busy machine
        registry.setParameters(Map.of("session", System.getProperty("session")));
        if (System.getProperty("user") != null) {
            registry.setUsername(System.getProperty("user"));
            registry.setPassword(System.getProperty("password"));
        }

        List<ProtocolConfig> protocols = new ArrayList<>();
        for (String protocol : System.getProperty("protocols").split(",")) { // name:port,...
            String[] parts = protocol.split(":");
            protocols.add(new ProtocolConfig(parts[0], Integer.parseInt(parts[1])));
        }

        ServiceConfig<Greeter> greeter = new ServiceConfig<>();
        greeter.setInterface(Greeter.class);
        greeter.setRef(new GreeterService());
        greeter.setGroup(System.getProperty("group"));
        greeter.setVersion(System.getProperty("version"));
        greeter.setWeight(Integer.getInteger("weight"));

        DubboBootstrap provider = DubboBootstrap.getInstance();
        provider.application(application).registry(registry).protocols(protocols).service(greeter);
        if (Boolean.getBoolean("two")) {
            ServiceConfig<Stock> stock = new ServiceConfig<>();
            stock.setInterface(Stock.class);
            stock.setRef(new StockService());
            stock.setVersion("2.0.0");
            provider.service(stock);
        }
        provider.start();
        System.out.println("READY");
        provider.await();
    }
}
